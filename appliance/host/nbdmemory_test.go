package host

import (
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"kagami/appliance/nbd"
)

// TestNBDMemoryIsShared: the clients of stalled groups send as much as they
// can. All exports of a group have one bound in common, and all groups of a
// daemon another; what one group cannot take is left to the next.
func TestNBDMemoryIsShared(t *testing.T) {
	const (
		write  = 256 << 10
		charge = write + 8<<10 // see package nbd
		all    = 90 << 20      // of the daemon
	)
	p := newPair(t)
	p.main.libvirtOff = true
	p.main.extra = "groups:\n"
	for _, group := range []string{"g1", "g2"} {
		p.main.extra += "  - name: " + group + "\n    peer: dr\n    disks:\n"
		for _, disk := range []string{"a", "b"} {
			p.main.extra += "      - {name: " + disk + ", image: " + p.main.path("disks", group+disk+".raw") + ", size: 1MiB}\n"
		}
	}
	d := p.main.daemon(p.dr) // which is not there
	d.nbdMemory = nbd.NewBudget(all)
	p.main.run(d)
	await(t, "daemon", func() bool { return len(p.main.status().Groups) == 2 })
	fill := func(group string) {
		for _, disk := range []string{"a", "a", "b", "b"} {
			c := dialNBD(t, p.main.path(p.main.runDir, group+"-"+disk+".sock"), disk)
			go func() { // ends with the connection
				req := binary.BigEndian.AppendUint32(nil, 0x25609513)
				req = append(req, 0, 0, 0, 1)                   // no flags, NBD_CMD_WRITE
				req = append(req, make([]byte, 16)...)          // cookie, offset
				req = binary.BigEndian.AppendUint32(req, write) // length
				req = append(req, make([]byte, write)...)
				for range 128 { // as many as run at once
					if _, err := c.Write(req); err != nil {
						return
					}
				}
			}()
		}
	}
	fill("g1")
	first := awaitRunning(t, d, "g1", nbdGroupMemory/10*9/charge)
	if first*charge > nbdGroupMemory+4*charge {
		t.Errorf("%d requests of 256 KiB of one group are held, which is more than %d bytes", first, nbdGroupMemory)
	}
	fill("g2")
	if n := first + awaitRunning(t, d, "g2", all/10*9/charge-first); n*charge > all+8*charge {
		t.Errorf("%d requests of 256 KiB are held, which is more than %d bytes", n, all)
	}
}

// awaitRunning returns how many requests of a group run once there are so many
// and no more are added.
func awaitRunning(t *testing.T, d *Daemon, group string, atLeast int) int {
	t.Helper()
	count := func() (n int) {
		g := d.find(group)
		g.mu.Lock()
		exports := g.src.exports
		g.mu.Unlock()
		for _, x := range exports {
			for _, name := range []string{"a", "b"} {
				for _, c := range x.server.Clients(name) {
					n += c.Running
				}
			}
		}
		return n
	}
	last, since := -1, time.Now()
	await(t, "requests of "+group, func() bool {
		n := count()
		if n != last {
			last, since = n, time.Now()
		}
		return n >= atLeast && time.Since(since) > 500*time.Millisecond
	})
	return last
}

// dialNBD opens an export of a fixed-newstyle server with NBD_OPT_EXPORT_NAME.
func dialNBD(t *testing.T, socket, export string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", socket)
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	_, err = io.ReadFull(c, make([]byte, 18))
	must(t, err)
	b := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	b = append(b, "IHAVEOPT"...)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, uint32(len(export)))
	_, err = c.Write(append(b, export...))
	must(t, err)
	_, err = io.ReadFull(c, make([]byte, 10))
	must(t, err)
	return c
}
