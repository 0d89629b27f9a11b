package qmp

import (
	"context"
	"fmt"
	"net"
	"time"
)

// onLost runs in the event loop.
func (l *Libvirt) onLost() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isLost {
		return
	}
	l.isLost = true
	close(l.lost)
	for q := range l.queues {
		q.push(Event{Kind: EventDisconnected})
	}
}

// Alive reports that the connection is not known to be lost.
func (l *Libvirt) Alive() bool {
	select {
	case <-l.lost:
		return false
	default:
		return true
	}
}

// Lost is closed when the connection is lost or closed.
func (l *Libvirt) Lost() <-chan struct{} { return l.lost }

// on finds a VM and does one piece of work on it. The lock, unless it is empty,
// is held until the last call of the work has ended, given up or not.
func (l *Libvirt) on(ctx context.Context, vm, lock string, f func(*worker) error) error {
	if err := l.gate.enter(); err != nil {
		return fmt.Errorf("%s: %w", vm, err)
	}
	defer l.gate.wg.Done()
	c := &calls{gate: &l.gate}
	unlock := func() {}
	if lock != "" {
		var err error
		if unlock, err = l.locks.lock(ctx, lock); err != nil {
			return err
		}
	}
	d, err := await(ctx, c, "look up "+vm, func() (*libvirtDomain, error) { return l.lookup(vm) })
	if err != nil {
		c.finish(unlock)
		return err
	}
	defer c.finish(func() {
		d.free()
		unlock()
	})
	return f(&worker{d: d, calls: c, locks: &l.locks, poll: 250 * time.Millisecond})
}

// onDisk is on with the disk's lock.
func (l *Libvirt) onDisk(ctx context.Context, vm, target string, f func(*worker) error) error {
	return l.on(ctx, vm, diskLock(vm, target), f)
}

// diskLock names a disk's lock; no VM's name has a slash.
func diskLock(vm, target string) string { return vm + "/" + target }

// VM is a VM libvirt knows.
type VM struct {
	Name, UUID string
	State      State
}

// QEMUUser is the user and group ids that QEMU runs as. Sockets and files it is to
// use must be open to them.
func (l *Libvirt) QEMUUser(ctx context.Context) (uid, gid int, err error) {
	caps, err := await(ctx, &calls{gate: &l.gate}, "ask for libvirt's capabilities", l.capabilities)
	if err != nil {
		return 0, 0, err
	}
	return qemuUser(caps)
}

// Networks makes the function that Mapping wants: libvirt's networks, and this
// host's interfaces and bridges, as they are now.
func (l *Libvirt) Networks(ctx context.Context) (func(name string) NetworkState, error) {
	states, err := await(ctx, &calls{gate: &l.gate}, "list networks", l.networks)
	if err != nil {
		return nil, err
	}
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	for _, i := range ifs {
		if _, defined := states[i.Name]; !defined {
			states[i.Name] = NetworkReady
		}
	}
	return func(n string) NetworkState { return states[n] }, nil
}

// HasKVM reports that libvirt offers KVM for some kind of guest here: /dev/kvm
// is there and QEMU can open it. That guests really boot with it, it does not tell.
func (l *Libvirt) HasKVM(ctx context.Context) (bool, error) {
	caps, err := await(ctx, &calls{gate: &l.gate}, "ask for libvirt's capabilities", l.capabilities)
	if err != nil {
		return false, err
	}
	return hasKVM(caps)
}

// Supervise streams what happens to VMs until ctx ends or the connection is
// lost; then the channel is closed.
func (l *Libvirt) Supervise(ctx context.Context) (<-chan Event, error) {
	q := newEventQueue()
	ids, err := await(ctx, &calls{gate: &l.gate}, "register for libvirt's events", func() ([]int, error) { return l.register(q) })
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.queues[q] = true
	if l.isLost {
		q.push(Event{Kind: EventDisconnected})
	}
	l.mu.Unlock()
	out := make(chan Event)
	go func() {
		defer close(out)
		q.pump(ctx, out)
		l.mu.Lock()
		delete(l.queues, q)
		l.mu.Unlock()
		l.deregister(ids)
	}()
	return out, nil
}
