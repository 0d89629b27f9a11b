package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"kagami/tests/acked/raw"
)

// nic gives a network card an address and switches it on.
func nic(_ *guest, a args, _ func(string)) error {
	name, err1 := a.word(0)
	address, err2 := a.word(1)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	return errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link))
}

// Numbers of the kernel's NBD client (linux/nbd-netlink.h).
const (
	nbdConnect, nbdReconfigure = 1, 3

	nbdAttrIndex, nbdAttrSize, nbdAttrBlockSize, nbdAttrTimeout, nbdAttrServerFlags = 1, 2, 3, 4, 5
	nbdAttrSockets, nbdAttrDeadTimeout                                              = 7, 8

	nbdSockItem, nbdSockFD = 1, 1
)

// attachNBD connects /dev/nbdNUMBER to an export, or gives it new connections
// in the place of dead ones. After timeout a request without a reply is sent
// on another connection; when all are dead, requests wait for new ones for the
// seconds of dead.
func attachNBD(_ *guest, a args, _ func(string)) error {
	if len(a.words) != 4 {
		return errors.New("four words are needed")
	}
	number, err := strconv.ParseUint(a.words[3], 10, 8)
	if err != nil {
		return err
	}
	conns, err1 := a.num("conns", 1)
	timeout, err2 := a.num("timeout", 30) // the kernel's own
	dead, err3 := a.num("dead", 0)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	var info raw.Info
	var fds []int
	for range conns {
		f, i, err := negotiate(a.words[1], a.words[2])
		if err != nil {
			return err
		}
		defer f.Close() // the kernel holds the socket
		info, fds = i, append(fds, int(f.Fd()))
	}
	number32 := nl.NewRtAttr(nbdAttrIndex, nl.Uint32Attr(uint32(number)))
	if a.words[0] == "reconnect" {
		return toNBD(nbdReconfigure, number32, sockets(fds))
	}
	return toNBD(nbdConnect, number32, sockets(fds), nl.NewRtAttr(nbdAttrSize, nl.Uint64Attr(uint64(info.Size))),
		nl.NewRtAttr(nbdAttrBlockSize, nl.Uint64Attr(512)), nl.NewRtAttr(nbdAttrServerFlags, nl.Uint64Attr(uint64(info.Flags))),
		nl.NewRtAttr(nbdAttrTimeout, nl.Uint64Attr(timeout)), nl.NewRtAttr(nbdAttrDeadTimeout, nl.Uint64Attr(dead)))
}

// negotiate returns a socket on which an export is ready.
func negotiate(address, export string) (*os.File, raw.Info, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return nil, raw.Info{}, err
	}
	defer c.Close()
	info, err := raw.Negotiate(c, export)
	if err != nil {
		return nil, raw.Info{}, err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return nil, raw.Info{}, fmt.Errorf("%T is no TCP connection", c)
	}
	f, err := tcp.File()
	return f, info, err
}

func sockets(fds []int) *nl.RtAttr {
	list := nl.NewRtAttr(nbdAttrSockets|unix.NLA_F_NESTED, nil)
	for _, fd := range fds {
		list.AddRtAttr(nbdSockItem|unix.NLA_F_NESTED, nil).AddRtAttr(nbdSockFD, nl.Uint32Attr(uint32(fd)))
	}
	return list
}

// toNBD sends a command to the kernel's NBD client.
func toNBD(command uint8, attrs ...*nl.RtAttr) error {
	family, err := netlink.GenlFamilyGet("nbd")
	if err != nil {
		return fmt.Errorf("the kernel's NBD client: %w", err)
	}
	req := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_ACK)
	req.AddData(&nl.Genlmsg{Command: command, Version: 1})
	for _, a := range attrs {
		req.AddData(a)
	}
	_, err = req.Execute(unix.NETLINK_GENERIC, 0)
	return err
}
