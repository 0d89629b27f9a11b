package wan

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	device = "wan0"
	mtu    = 1500
)

// openTUN makes the device in the namespace of the calling thread, with
// checksum and TSO offloads, so that one system call moves up to 64 KiB.
func openTUN() (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	if err := setUpTUN(fd); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), device), nil
}

func setUpTUN(fd int) error {
	ifr, err := unix.NewIfreq(device)
	if err != nil {
		return fmt.Errorf("name %s: %w", device, err)
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("TUNSETIFF %s: %w", device, err)
	}
	offloads := unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return fmt.Errorf("TUNSETOFFLOAD: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return fmt.Errorf("make %s non-blocking: %w", device, err)
	}
	return nil
}

// configure brings up lo and the device inside the calling thread's namespace.
func configure(addr netip.Prefix) error {
	if addr.Addr().Is4() { // no neighbour discovery among the counted packets
		p := filepath.Join("/proc/sys/net/ipv6/conf", device, "disable_ipv6")
		if err := os.WriteFile(p, []byte("1"), 0); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("disable IPv6 on %s: %w", device, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	tun, err := netlink.LinkByName(device)
	if err != nil {
		return fmt.Errorf("find %s: %w", device, err)
	}
	if err := netlink.LinkSetMTU(tun, mtu); err != nil {
		return fmt.Errorf("set the MTU of %s: %w", device, err)
	}
	ip := &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), addr.Addr().BitLen())}
	if err := netlink.AddrAdd(tun, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}); err != nil {
		return fmt.Errorf("give %s the address %v: %w", device, addr, err)
	}
	if err := netlink.LinkSetUp(tun); err != nil {
		return fmt.Errorf("set %s up: %w", device, err)
	}
	return nil
}
