// kvt-error.h - the last error of a thread, which kvt.h's functions leave for kvt_last_error (C++, inside libllama only)
#pragma once

#include <cstdint>
#include <string>

// set the calling thread's last error and return the code
int32_t kvt_error(int32_t code, const std::string & text);
