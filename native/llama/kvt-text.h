// kvt-text.h - text for notes and errors (C++, inside libllama only)
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// a string from a file as it may be printed: short, and without control characters
std::string kvt_printable(const char * s);

// "0-3,7" for { 0, 1, 2, 3, 7 }
std::string kvt_layer_ranges(const std::vector<uint32_t> & il);

// one line each, in buf, which may be null; returns the length needed without the 0 (as snprintf)
int32_t kvt_write_lines(const std::vector<std::string> & lines, char * buf, int32_t size);
