// kvt-text.cpp - text for notes and errors
#include "kvt-text.h"

#include <cstdio>
#include <cstring>

std::string kvt_printable(const char * s) {
    std::string res;
    for (size_t i = 0; s[i] && i < 40; i++) {
        res += (unsigned char) s[i] < 32 || (unsigned char) s[i] >= 127 ? '?' : s[i];
    }
    return strlen(s) > 40 ? res + "..." : res;
}

std::string kvt_layer_ranges(const std::vector<uint32_t> & il) {
    std::string res;
    for (size_t i = 0; i < il.size();) {
        size_t j = i;
        while (j + 1 < il.size() && il[j + 1] == il[j] + 1) {
            j++;
        }
        res += (res.empty() ? "" : ",") + std::to_string(il[i]) + (j > i ? "-" + std::to_string(il[j]) : "");
        i = j + 1;
    }
    return res;
}

int32_t kvt_write_lines(const std::vector<std::string> & lines, char * buf, int32_t size) {
    std::string text;
    for (const auto & line : lines) {
        text += line + "\n";
    }
    return buf && size > 0 ? snprintf(buf, size, "%s", text.c_str()) : (int32_t) text.size();
}
