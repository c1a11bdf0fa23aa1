// kvt-rpc-socket.h - what sockets are set to, so that the other side's end is no end of this process, and is found out. Included by transport.cpp
#pragma once

#ifdef _WIN32
#    include <winsock2.h>
#    include <ws2tcpip.h>
#else
#    include <netinet/in.h>
#    include <netinet/tcp.h>
#    include <sys/socket.h>
#endif

// flags of send(): no signal
#ifdef MSG_NOSIGNAL
#    define KVT_SEND_FLAGS MSG_NOSIGNAL
#else
#    define KVT_SEND_FLAGS 0
#endif

template <typename fd_t>
static void kvt_set_option(fd_t fd, int level, int name, int value) {
    setsockopt(fd, level, name, (const char *) &value, sizeof(value));
}

// A machine that went without a word, by its power or its cable, is lost after a minute: the system asks whether it is still there, also
// while nothing is sent, as a graph may take long. A process that hangs is not found out: its system answers
template <typename fd_t>
static void kvt_keep_alive(fd_t fd) {
    kvt_set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
#ifdef TCP_KEEPIDLE
    kvt_set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 30); // s
#endif
#ifdef TCP_KEEPALIVE // macOS
    kvt_set_option(fd, IPPROTO_TCP, TCP_KEEPALIVE, 30);
#endif
#ifdef TCP_KEEPINTVL
    kvt_set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 10);
#endif
#ifdef TCP_KEEPCNT
    kvt_set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
#endif
#ifdef TCP_USER_TIMEOUT // what was sent and is not answered
    kvt_set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 60000); // ms
#endif
}
