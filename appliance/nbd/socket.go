package nbd

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// control runs call on the descriptor of a socket; of a connection that is
// none, not at all. It is false when the socket was closed on our side.
func control(nc net.Conn, call func(fd int)) (open bool) {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return true
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	return raw.Control(func(fd uintptr) { call(int(fd)) }) == nil
}

// hungUp says whether the peer has closed its end, even when there is input
// left to read. Of a connection that is no socket it is not known.
func hungUp(nc net.Conn) bool {
	gone := false
	open := control(nc, func(fd int) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(fds, 0)
		gone = err == nil && n > 0 && fds[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || !open
}

// peerPID is the process that connected a unix socket, 0 if not known.
func peerPID(nc net.Conn) (pid int) {
	control(nc, func(fd int) {
		if cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
