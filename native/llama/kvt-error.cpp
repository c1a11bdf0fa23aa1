// kvt-error.cpp - the last error of a thread
#include "kvt-error.h"
#include "kvt.h"

static thread_local std::string kvt_error_text;

int32_t kvt_error(int32_t code, const std::string & text) {
    kvt_error_text = text;
    return code;
}

const char * kvt_last_error(void) {
    return kvt_error_text.c_str();
}
