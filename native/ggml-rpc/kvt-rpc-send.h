// kvt-rpc-send.h - flags of send(): a host that ended is no signal that ends this process. Included by transport.cpp
#pragma once

#ifndef _WIN32
#    include <sys/socket.h>
#endif

#ifdef MSG_NOSIGNAL
#    define KVT_SEND_FLAGS MSG_NOSIGNAL
#else
#    define KVT_SEND_FLAGS 0
#endif
