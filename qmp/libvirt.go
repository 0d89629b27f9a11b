package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	gq "github.com/digitalocean/go-qemu/qmp"
	"libvirt.org/go/libvirt"
)

// Keepalive: a libvirtd that does not answer for this long is taken for dead.
const (
	keepAliveSeconds = 5
	keepAliveCount   = 3
)

// callLimit is how long Close waits for calls under way.
const callLimit = 10 * time.Second

// eventLoop runs libvirt's event loop for as long as the process runs: it serves
// all connections, keepalives and events, and libvirt has no way to stop it.
var eventLoop = sync.OnceValue(func() error {
	if err := libvirt.EventRegisterDefaultImpl(); err != nil {
		return err
	}
	// A timer that does nothing, so that the loop never waits with nothing registered.
	if _, err := libvirt.EventAddTimeout(1000, func(int) {}); err != nil {
		return err
	}
	go func() {
		for {
			if err := libvirt.EventRunDefaultImpl(); err != nil {
				time.Sleep(100 * time.Millisecond) // poll(2) failed; there is nothing else to do than try again
			}
		}
	}()
	return nil
})

// Libvirt is one connection. All methods are safe for concurrent use. When
// libvirtd goes away, calls fail, Lost is closed, and a new Connect is needed: VMs go on meanwhile.
type Libvirt struct {
	conn  *libvirt.Connect
	gate  gate
	locks locks
	lost  chan struct{}

	mu     sync.Mutex
	queues map[*eventQueue]bool // of Supervise; told when the connection is lost
	isLost bool
}

// Connect opens a connection, for instance to qemu:///system.
func Connect(ctx context.Context, uri string) (*Libvirt, error) {
	if err := eventLoop(); err != nil {
		return nil, fmt.Errorf("start libvirt's event loop: %w", plain(err))
	}
	type result struct {
		l   *Libvirt
		err error
	}
	done := make(chan result, 1)
	go func() {
		l, err := open(uri)
		done <- result{l, err}
	}()
	select {
	case r := <-done:
		return r.l, r.err
	case <-ctx.Done():
		go func() { // the connection that comes too late
			if r := <-done; r.l != nil {
				_ = r.l.Close() // nobody uses it
			}
		}()
		return nil, fmt.Errorf("connect to libvirt at %s: %w", uri, ctx.Err())
	}
}

func open(uri string) (*Libvirt, error) {
	conn, err := libvirt.NewConnect(uri)
	if err != nil {
		return nil, fmt.Errorf("connect to libvirt at %s (does libvirtd run?): %w", uri, plain(err))
	}
	l := &Libvirt{conn: conn, lost: make(chan struct{}), queues: map[*eventQueue]bool{}}
	err = conn.RegisterCloseCallback(func(*libvirt.Connect, libvirt.ConnectCloseReason) { l.onLost() })
	if err == nil {
		err = conn.SetKeepAlive(keepAliveSeconds, keepAliveCount)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to libvirt at %s: %w", uri, errors.Join(plain(err), l.Close()))
	}
	return l, nil
}

// Close ends the connection. Calls under way have 10 seconds to end.
func (l *Libvirt) Close() error {
	l.onLost()
	if err := l.gate.close(callLimit); err != nil {
		return fmt.Errorf("close the connection to libvirt: %w", err)
	}
	err := l.conn.UnregisterCloseCallback()
	if _, err2 := l.conn.Close(); err2 != nil {
		err = errors.Join(err, err2)
	}
	if err != nil && l.Alive() {
		return fmt.Errorf("close the connection to libvirt: %w", err)
	}
	return nil // a lost connection cannot be closed in order
}

func (l *Libvirt) lookup(vm string) (*libvirtDomain, error) {
	d, err := l.conn.LookupDomainByName(vm)
	if isCode(err, libvirt.ERR_NO_DOMAIN) {
		return nil, advise(ErrNoDomain, "libvirt knows no VM %q: see virsh list --all", vm)
	} else if err != nil {
		return nil, plain(err)
	}
	return &libvirtDomain{conn: l.conn, d: d, vm: vm}, nil
}

func isCode(err error, code libvirt.ErrorNumber) bool {
	var e libvirt.Error
	return errors.As(err, &e) && e.Code == code
}

// plain is libvirt's error in its own words only.
func plain(err error) error {
	var e libvirt.Error
	if errors.As(err, &e) {
		return &libvirtError{e}
	}
	return err
}

type libvirtError struct{ err libvirt.Error }

func (e *libvirtError) Error() string { return "libvirt: " + e.err.Message }
func (e *libvirtError) Unwrap() error { return e.err }

// libvirtDomain is domain on libvirt.
type libvirtDomain struct {
	conn *libvirt.Connect
	d    *libvirt.Domain
	vm   string
}

func (d *libvirtDomain) name() string { return d.vm }

// free gives the handle back; the VM does not notice.
func (d *libvirtDomain) free() { _ = d.d.Free() }

// xml asks for secrets, too: without a console's password, a replica would have none.
func (d *libvirtDomain) xml(inactive bool) (string, error) {
	flags := libvirt.DOMAIN_XML_SECURE
	if inactive {
		flags |= libvirt.DOMAIN_XML_INACTIVE
	}
	s, err := d.d.GetXMLDesc(flags)
	return s, plain(err)
}

func (d *libvirtDomain) state() (State, error) {
	s, reason, err := d.d.GetState()
	return stateOf(s, reason), plain(err)
}

func stateOf(s libvirt.DomainState, reason int) State {
	switch s {
	case libvirt.DOMAIN_RUNNING, libvirt.DOMAIN_BLOCKED:
		return StateRunning
	case libvirt.DOMAIN_PAUSED:
		if libvirt.DomainPausedReason(reason) == libvirt.DOMAIN_PAUSED_IOERROR {
			return StateIOError
		}
		return StatePaused
	case libvirt.DOMAIN_PMSUSPENDED:
		return StatePaused
	case libvirt.DOMAIN_SHUTDOWN:
		return StateStopping
	case libvirt.DOMAIN_SHUTOFF:
		return StateShutoff
	case libvirt.DOMAIN_CRASHED:
		return StateCrashed
	}
	return StateUnknown
}

func (d *libvirtDomain) persistent() (bool, error) {
	b, err := d.d.IsPersistent()
	return b, plain(err)
}

func (d *libvirtDomain) hasManagedSave() (bool, error) {
	b, err := d.d.HasManagedSaveImage(0)
	return b, plain(err)
}

func (d *libvirtDomain) capacity(target string) (int64, error) {
	i, err := d.d.GetBlockInfo(target, 0)
	if err != nil {
		return 0, plain(err)
	}
	if i.Capacity > 1<<62 {
		return 0, fmt.Errorf("libvirt tells a size of %d bytes", i.Capacity)
	}
	return int64(i.Capacity), nil
}

func (d *libvirtDomain) blockCopy(target, destination string, reuse bool, bandwidth uint64) error {
	flags := libvirt.DOMAIN_BLOCK_COPY_TRANSIENT_JOB
	if reuse {
		flags |= libvirt.DOMAIN_BLOCK_COPY_REUSE_EXT
	}
	p := &libvirt.DomainBlockCopyParameters{Bandwidth: bandwidth, BandwidthSet: bandwidth > 0}
	return plain(d.d.BlockCopy(target, destination, p, flags))
}

func (d *libvirtDomain) blockJob(target string) (*blockJob, error) {
	i, err := d.d.GetBlockJobInfo(target, libvirt.DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES)
	if err != nil {
		return nil, plain(err)
	}
	if i.Type == libvirt.DOMAIN_BLOCK_JOB_TYPE_UNKNOWN {
		return nil, nil
	}
	return &blockJob{cur: i.Cur, end: i.End}, nil
}

// abortJob: without pivot it does not wait for the job's end, which a server
// that hangs can hold up.
func (d *libvirtDomain) abortJob(target string, pivot bool) error {
	flags := libvirt.DOMAIN_BLOCK_JOB_ABORT_ASYNC
	if pivot {
		flags = libvirt.DOMAIN_BLOCK_JOB_ABORT_PIVOT
	}
	return plain(d.d.BlockJobAbort(target, flags))
}

func (d *libvirtDomain) define(xml string) error {
	n, err := d.conn.DomainDefineXML(xml)
	if err != nil {
		return plain(err)
	}
	return plain(n.Free())
}

func (d *libvirtDomain) startPaused() error {
	return plain(d.d.CreateWithFlags(libvirt.DOMAIN_START_PAUSED))
}

func (d *libvirtDomain) resume() error  { return plain(d.d.Resume()) }
func (d *libvirtDomain) destroy() error { return plain(d.d.Destroy()) }
func (d *libvirtDomain) shutdown() error {
	return plain(d.d.ShutdownFlags(libvirt.DOMAIN_SHUTDOWN_DEFAULT))
}
func (d *libvirtDomain) freeze() error { return plain(d.d.FSFreeze(nil, 0)) }
func (d *libvirtDomain) thaw() error   { return plain(d.d.FSThaw(nil, 0)) }

// undefine leaves firmware variables and TPM state where they are.
func (d *libvirtDomain) undefine() error {
	return plain(d.d.UndefineFlags(libvirt.DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.DOMAIN_UNDEFINE_SNAPSHOTS_METADATA |
		libvirt.DOMAIN_UNDEFINE_CHECKPOINTS_METADATA | libvirt.DOMAIN_UNDEFINE_KEEP_NVRAM | libvirt.DOMAIN_UNDEFINE_KEEP_TPM))
}

func (d *libvirtDomain) autostart() error { return plain(d.d.SetAutostart(true)) }

func (d *libvirtDomain) monitor() gq.Monitor { return d.newMonitor() }

func (d *libvirtDomain) newMonitor() *Monitor {
	return &Monitor{
		command: func(cmd string) (string, error) {
			out, err := d.d.QemuMonitorCommand(cmd, libvirt.DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)
			return out, plain(err)
		},
		events: d.qemuEvents,
	}
}

// qemuEvents registers for all of QEMU's events; the name is a regular
// expression, since an empty one matches nothing.
func (d *libvirtDomain) qemuEvents(ctx context.Context) (<-chan gq.Event, error) {
	out := make(chan gq.Event, 256)
	var mu sync.Mutex
	ended := false
	id, err := d.conn.DomainQemuMonitorEventRegister(d.d, ".*", func(_ *libvirt.Connect, _ *libvirt.Domain, e *libvirt.DomainQemuMonitorEvent) {
		ev := gq.Event{Event: e.Event}
		ev.Timestamp.Seconds, ev.Timestamp.Microseconds = e.Seconds, int64(e.Micros)
		if e.Details != "" && json.Unmarshal([]byte(e.Details), &ev.Data) != nil {
			return // not a JSON object: no event of QEMU
		}
		mu.Lock()
		defer mu.Unlock()
		if ended {
			return
		}
		select {
		case out <- ev:
		default: // the reader is too slow; see Monitor.Events
		}
	}, libvirt.CONNECT_DOMAIN_QEMU_MONITOR_EVENT_REGISTER_REGEX)
	if err != nil {
		return nil, plain(err)
	}
	context.AfterFunc(ctx, func() {
		_ = d.conn.DomainQemuEventDeregister(id) // fails only when the connection, and the registration with it, is gone
		mu.Lock()
		defer mu.Unlock()
		ended = true
		close(out)
	})
	return out, nil
}

// VMs lists all VMs.
func (l *Libvirt) VMs(ctx context.Context) ([]VM, error) {
	return await(ctx, &calls{gate: &l.gate}, "list VMs", func() ([]VM, error) {
		ds, err := l.conn.ListAllDomains(0)
		if err != nil {
			return nil, plain(err)
		}
		var vms []VM
		for i := range ds {
			v, err2 := describe(&ds[i])
			if err2 == nil {
				vms = append(vms, v)
			} else if !isCode(err2, libvirt.ERR_NO_DOMAIN) { // gone since
				err = errors.Join(err, plain(err2))
			}
			_ = ds[i].Free() // a handle
		}
		return vms, err
	})
}

func describe(d *libvirt.Domain) (VM, error) {
	name, err1 := d.GetName()
	uuid, err2 := d.GetUUIDString()
	s, reason, err3 := d.GetState()
	return VM{Name: name, UUID: uuid, State: stateOf(s, reason)}, errors.Join(err1, err2, err3)
}

// Define makes or changes a stored definition.
func (l *Libvirt) Define(ctx context.Context, xml string) error {
	return awaitErr(ctx, &calls{gate: &l.gate}, "define the VM", func() error {
		d, err := l.conn.DomainDefineXML(xml)
		if err != nil {
			return plain(err)
		}
		return plain(d.Free())
	})
}

func (l *Libvirt) capabilities() (string, error) {
	s, err := l.conn.GetCapabilities()
	return s, plain(err)
}

func (l *Libvirt) networks() (map[string]NetworkState, error) {
	ns, err := l.conn.ListAllNetworks(0)
	if err != nil {
		return nil, plain(err)
	}
	states := map[string]NetworkState{}
	for i := range ns {
		name, err2 := ns[i].GetName() // local
		active, err3 := ns[i].IsActive()
		switch {
		case err2 != nil || err3 != nil: // gone since
		case active:
			states[name] = NetworkReady
		default:
			states[name] = NetworkInactive
		}
		_ = ns[i].Free() // a handle
	}
	return states, nil
}

func (l *Libvirt) register(q *eventQueue) ([]int, error) {
	a, err := l.conn.DomainEventLifecycleRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventLifecycle) {
		if ev, ok := lifecycle(e); ok {
			q.push(named(d, ev))
		}
	})
	if err != nil {
		return nil, plain(err)
	}
	b, err := l.conn.DomainEventIOErrorReasonRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventIOErrorReason) {
		q.push(named(d, Event{Kind: EventIOError, Device: e.DevAlias, Reason: e.Reason, Action: ioAction(e.Action)}))
	})
	if err != nil {
		return nil, errors.Join(plain(err), l.conn.DomainEventDeregister(a))
	}
	return []int{a, b}, nil
}

func (l *Libvirt) deregister(ids []int) {
	if l.gate.enter() != nil {
		return // closed: registrations ended with the connection
	}
	defer l.gate.wg.Done()
	for _, id := range ids {
		_ = l.conn.DomainEventDeregister(id) // fails only when the connection is gone
	}
}

// named fills in whose event it is; both calls are local.
func named(d *libvirt.Domain, e Event) Event {
	e.VM, _ = d.GetName()
	e.UUID, _ = d.GetUUIDString()
	return e
}

func ioAction(a libvirt.DomainEventIOErrorAction) string {
	switch a {
	case libvirt.DOMAIN_EVENT_IO_ERROR_PAUSE:
		return "pause"
	case libvirt.DOMAIN_EVENT_IO_ERROR_REPORT:
		return "report"
	}
	return "none"
}

func lifecycle(e *libvirt.DomainEventLifecycle) (Event, bool) {
	kinds := map[libvirt.DomainEventType]EventKind{
		libvirt.DOMAIN_EVENT_STARTED: EventStarted, libvirt.DOMAIN_EVENT_RESUMED: EventResumed,
		libvirt.DOMAIN_EVENT_SUSPENDED: EventPaused, libvirt.DOMAIN_EVENT_STOPPED: EventStopped,
		libvirt.DOMAIN_EVENT_CRASHED: EventCrashed, libvirt.DOMAIN_EVENT_DEFINED: EventDefined,
		libvirt.DOMAIN_EVENT_UNDEFINED: EventUndefined,
	}
	kind, ok := kinds[e.Event]
	ev := Event{Kind: kind}
	if kind == EventPaused {
		ev.State = StatePaused
		if libvirt.DomainEventSuspendedDetailType(e.Detail) == libvirt.DOMAIN_EVENT_SUSPENDED_IOERROR {
			ev.State = StateIOError
		}
	}
	// String prints: Domain event="started" detail="booted".
	if _, d, found := strings.Cut(e.String(), `detail="`); found {
		ev.Reason, _, _ = strings.Cut(d, `"`)
	}
	return ev, ok
}
