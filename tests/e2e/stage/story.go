package stage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"libvirt.org/go/libvirtxml"

	"kagami/appliance/control"
	"kagami/tests/guest"
	"kagami/tests/guest/workload"
	"kagami/tests/wan"
)

// StoryOptions of a Story.
type StoryOptions struct {
	Kagami string    // path of the binary
	Out    io.Writer // what happens, as it happens
	// FromDisk: the VM boots from the protected disk itself (GPT, ext4 root,
	// its own kernel); otherwise it has a kernel of the host and a data disk vdb.
	FromDisk bool
	Home     bool          // the lost site comes back, and the VM goes home
	Keep     bool          // leave everything running; Summary.Stage is then the caller's to close
	Load     time.Duration // how long the writer runs under protection; 8 s when 0
}

// The story's VM, at the source and at the replica.
const (
	vmName, replicaName           = "vm1", "vm1-dr"
	sourceNetwork, replicaNetwork = "production", "recovery"
	vmUUID                        = "6b1d2c9e-0000-4000-8000-00000000000d"
	vmMAC                         = "52:54:00:6b:67:01"
)

type story struct {
	o       StoryOptions
	s       *Stage
	sum     Summary
	disk    string // target of the protected disk
	mainDir string
	drDir   string
	ctx     context.Context
}

// Story plays the whole path once: a VM writes and fsyncs; it is protected
// while it does; the appliance is killed and comes back; the site is lost; the
// other site takes over; every acknowledged record is looked for.
func Story(ctx context.Context, o StoryOptions) (Summary, error) {
	if o.Load == 0 {
		o.Load = 8 * time.Second
	}
	t := &story{o: o, disk: "vdb", ctx: ctx}
	if o.FromDisk {
		t.disk = "vda"
	}
	began := time.Now()
	err := t.play()
	t.sum.Took = time.Since(began)
	if t.s == nil {
		return t.sum, err
	}
	if o.Keep {
		t.sum.Stage = t.s
		return t.sum, err
	}
	if err != nil {
		err = fmt.Errorf("%w\n--- daemon at %s:\n%s\n--- daemon at %s:\n%s", err, MainName, t.s.Main.tail(), DRName, t.s.DR.tail())
	}
	return t.sum, errors.Join(err, t.s.Close())
}

func (t *story) play() error {
	for _, step := range t.steps() {
		t.say("── %s", step.name)
		began := time.Now()
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		t.sum.Steps = append(t.sum.Steps, Step{step.name, time.Since(began)})
	}
	return nil
}

type step struct {
	name string
	do   func() error
}

func (t *story) steps() []step {
	steps := []step{
		{"set up two sites and the line between them", t.setUp},
		{"boot the VM", t.bootGuest},
		{"start the writer in the guest", t.startWriter},
		{"protect the VM while it writes", t.protect},
		{"write under protection", t.load},
		{"kill the appliance at the source, and restart it", t.killAppliance},
		{"write on", t.load},
		{"disaster: QEMU and the source daemon are killed, the line is cut", t.disaster},
		{"fail over", t.failover},
		{"check the file system as the failover left it", t.fsck},
		{"look at the replica VM", t.identity},
		{"look for every acknowledged record in the replica VM", t.check},
	}
	if t.o.Home {
		steps = append(steps,
			step{"the lost site comes back, and becomes the replica while the VM writes", t.comeBack},
			step{"the VM goes home", t.goHome},
			step{"look for every acknowledged record at home", t.checkHome})
	}
	return append(steps, step{"stop the VM and check the file system again", t.stop})
}

func (t *story) say(format string, a ...any) { fmt.Fprintf(t.o.Out, format+"\n", a...) }

func (t *story) setUp() error {
	s, err := New(t.ctx, Options{Kagami: t.o.Kagami, Libvirt: true})
	if err != nil {
		return err
	}
	t.s = s
	if t.mainDir, err = s.Main.Lab.GuestDir("vm"); err != nil {
		return err
	}
	if t.drDir, err = s.DR.Lab.GuestDir("vm"); err != nil {
		return err
	}
	if err := t.mapAtDR(); err != nil {
		return err
	}
	for _, site := range []*Site{s.DR, s.Main} {
		if err := site.Start(t.ctx); err != nil {
			return err
		}
	}
	out, err := s.Link.Exec(t.ctx, wan.A, "ping", "-c", "3", "-i", "0.2", "-q", s.Link.Addr(wan.B).String())
	if err != nil {
		return fmt.Errorf("ping the other site: %w: %s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "rtt") {
			t.sum.RTT = strings.TrimSpace(line)
		}
	}
	t.say("   site %s and site %s, line of 1 Gbit/s, ping: %s", MainName, DRName, t.sum.RTT)
	return nil
}

// mapAtDR writes what the replica needs beyond the protected disk into the
// config file of the other site: another name and network, a kernel for direct
// boot, the unprotected disk, the places of consoles. UUID and MAC are kept.
func (t *story) mapAtDR() error {
	if err := t.s.DR.Lab.Network(t.ctx, replicaNetwork); err != nil {
		return err
	}
	text := fmt.Sprintf("groups:\n  - name: %s\n    domain:\n      name: %s\n      networks:\n        - from: %s\n          to: %s\n      paths:\n        - from: %s\n          to: %s\n",
		vmName, replicaName, sourceNetwork, replicaNetwork, t.mainDir, t.drDir)
	if !t.o.FromDisk {
		kernel, initrd, err := guest.BuildInitrd(t.drDir)
		if err != nil {
			return err
		}
		scratch := filepath.Join(t.drDir, "scratch.raw")
		if err := guest.BuildExt4(scratch, 32<<20); err != nil {
			return err
		}
		if err := t.s.DR.Lab.AllowQEMU(scratch); err != nil {
			return err
		}
		text += fmt.Sprintf("      kernel: %s\n      initrd: %s\n      disks:\n        - target: vda\n          file: %s\n", kernel, initrd, scratch)
	}
	f, err := os.OpenFile(t.s.DR.Config(), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

func (t *story) bootGuest() error {
	if err := t.s.Main.Lab.Network(t.ctx, sourceNetwork); err != nil {
		return err
	}
	d := guest.Domain{Name: vmName, UUID: vmUUID, Dir: t.mainDir, Extra: guest.NIC(sourceNetwork, vmMAC)}
	image := filepath.Join(t.mainDir, "data.raw")
	if t.o.FromDisk {
		if err := guest.BuildGPTDisk(image, guest.GPTOptions{}); err != nil {
			return err
		}
		d.Disks = []string{guest.FileDisk(image, "vda")}
	} else {
		kernel, initrd, err := guest.BuildInitrd(t.mainDir)
		if err != nil {
			return err
		}
		d.Kernel, d.Initrd = kernel, initrd
		d.Type = guest.DomainType(t.ctx, kernel, initrd)
		scratch := filepath.Join(t.mainDir, "scratch.raw")
		ballast, err := t.ballast()
		if err != nil {
			return err
		}
		if err := errors.Join(guest.BuildExt4(image, 256<<20, "-d", ballast), guest.BuildExt4(scratch, 32<<20), t.s.Main.Lab.AllowQEMU(scratch)); err != nil {
			return err
		}
		d.Disks = []string{guest.FileDisk(scratch, "vda"), guest.FileDisk(image, "vdb")}
	}
	if err := t.s.Main.Lab.AllowQEMU(image); err != nil {
		return err
	}
	xml := filepath.Join(t.mainDir, "domain.xml")
	if err := os.WriteFile(xml, []byte(d.XML()), 0o644); err != nil {
		return err
	}
	for _, args := range [][]string{{"define", xml}, {"start", vmName}} {
		if err := t.virsh(t.s.Main, args...); err != nil {
			return err
		}
	}
	return t.atConsole(t.mainDir, func(c *guest.Console) error {
		out, err := c.Run(t.ctx, "cat /proc/version")
		t.say("   %s", strings.TrimSpace(out))
		return err
	})
}

// ballastBytes fill the disk beside the writer's files, so that the first copy
// takes long enough to be watched: a second at 1 Gbit/s.
const ballastBytes = 128 << 20

// ballast makes a folder with a file that does not compress.
func (t *story) ballast() (string, error) {
	dir := filepath.Join(t.mainDir, "ballast")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	b := make([]byte, ballastBytes)
	if _, err := rand.NewChaCha8([32]byte{1}).Read(b); err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "ballast"), b, 0o644)
}

func (t *story) virsh(site *Site, args ...string) error {
	out, err := exec.CommandContext(t.ctx, "virsh", append([]string{"-q", "-c", site.Lab.URI}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("virsh %v at site %s: %w: %s", args, site.Name, err, out)
	}
	return nil
}

// bootPatience is how long a guest may take to answer, under software emulation.
const bootPatience = 90 * time.Second

func (t *story) atConsole(dir string, do func(*guest.Console) error) error {
	ctx, cancel := context.WithTimeout(t.ctx, bootPatience)
	defer cancel()
	c, err := guest.Dial(ctx, filepath.Join(dir, guest.ControlSock))
	if err != nil {
		return err
	}
	defer c.Close()
	return do(c)
}

// dataDir is where the writer's files are in the guest.
func (t *story) dataDir() string {
	if t.o.FromDisk {
		return "/data"
	}
	return "/mnt"
}

func (t *story) startWriter() error {
	return t.atConsole(t.mainDir, func(c *guest.Console) error {
		if err := t.mount(c); err != nil {
			return err
		}
		_, err := c.Run(t.ctx, "writer start %s every=2 slots=256", t.dataDir())
		return err
	})
}

func (t *story) mount(c *guest.Console) error {
	if t.o.FromDisk {
		return nil // the root file system
	}
	_, err := c.Run(t.ctx, "mount /dev/vdb %s", t.dataDir())
	return err
}

func (t *story) acks() (workload.Acks, error) {
	return workload.ReadAcksFile(filepath.Join(t.mainDir, guest.AckFile))
}

func (t *story) protect() error {
	args := []string{"protect", vmName, "--to", DRName}
	if !t.o.FromDisk {
		args = append(args, "--disk", t.disk)
	}
	bar, err := t.showBar(t.s.Main, args...)
	if err != nil {
		return err
	}
	if !t.o.FromDisk && (!strings.Contains(bar, "[#") || !strings.Contains(bar, "/s") || !strings.Contains(bar, " left")) {
		return fmt.Errorf("protect drew no bar with rate and time left; its progress: %q", bar)
	}
	for _, site := range []*Site{t.s.Main, t.s.DR} {
		t.say("   kagami status at site %s:", site.Name)
		if err := t.show(site, "status"); err != nil {
			return err
		}
	}
	g, err := t.s.Main.Group(t.ctx, vmName)
	if err != nil {
		return err
	}
	if !g.Protected {
		return fmt.Errorf("after protect, status says %s, not protected", g.State)
	}
	return nil
}

// load lets the writer run and sees to it that it gets on and gets no error.
func (t *story) load() error {
	before, err := t.acks()
	if err != nil {
		return err
	}
	select {
	case <-t.ctx.Done():
		return t.ctx.Err()
	case <-time.After(t.o.Load):
	}
	after, err := t.acks()
	if err != nil {
		return err
	}
	if len(after.Errors) > 0 {
		return fmt.Errorf("the guest saw I/O errors: %v", after.Errors)
	}
	if after.Append <= before.Append || after.Blocks <= before.Blocks {
		return fmt.Errorf("the writer stands still: %d appends and %d overwrites acknowledged before, %d and %d after %v",
			before.Append, before.Blocks, after.Append, after.Blocks, t.o.Load)
	}
	t.say("   acknowledged in %v: %d appends with fsync, %d overwrites with fdatasync", t.o.Load, after.Append-before.Append, after.Blocks-before.Blocks)
	return nil
}

func (t *story) killAppliance() error {
	if err := t.countBytes(); err != nil {
		return err
	}
	if err := t.s.Main.Kill(); err != nil {
		return err
	}
	stalled, err := t.acks()
	if err != nil {
		return err
	}
	time.Sleep(2 * time.Second)
	began := time.Now()
	if err := t.s.Main.Start(t.ctx); err != nil {
		return err
	}
	t.sum.SourceRestarts++
	ctx, cancel := context.WithTimeout(t.ctx, time.Minute)
	defer cancel()
	for {
		now, err := t.acks()
		if err != nil {
			return err
		}
		if len(now.Errors) > 0 {
			return fmt.Errorf("the guest saw I/O errors: %v", now.Errors)
		}
		if now.Append > stalled.Append+1 && now.Blocks > stalled.Blocks+1 {
			t.say("   the guest stalled and went on %v after the restart, without an error", time.Since(began).Round(10*time.Millisecond))
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the guest did not go on within a minute of the restart")
		case <-time.After(50 * time.Millisecond):
		}
	}
	_, err = t.s.Main.AwaitGroup(ctx, vmName, "protection", func(g control.Group) bool { return g.State == "streaming" && g.Protected })
	return err
}

// countBytes adds what the source daemon has counted in its life.
func (t *story) countBytes() error {
	st, err := t.s.Main.Status(t.ctx)
	if err != nil {
		return err
	}
	for _, g := range st.Groups {
		t.sum.GuestBytes += g.Written
	}
	for _, p := range st.Peers {
		t.sum.ShippedBytes += p.SentBytes
	}
	return nil
}

// disaster kills the QEMU process and the source daemon together and cuts the line.
func (t *story) disaster() error {
	if err := t.countBytes(); err != nil {
		return err
	}
	qemu, err := t.s.Main.Lab.GuestPID(vmName)
	if err != nil {
		return err
	}
	daemon := t.s.Main.PID()
	if err := errors.Join(syscall.Kill(qemu, syscall.SIGKILL), syscall.Kill(daemon, syscall.SIGKILL)); err != nil {
		return fmt.Errorf("kill QEMU and daemon: %w", err)
	}
	t.s.Link.Cut()
	if err := t.s.Main.Kill(); err != nil {
		return err
	}
	time.Sleep(500 * time.Millisecond) // the last line of the console is in its file
	if t.sum.Acked, err = t.acks(); err != nil {
		return err
	}
	t.say("   acknowledged on the source's console: %d appends, %d overwrites", t.sum.Acked.Append, t.sum.Acked.Blocks)
	return nil
}

func (t *story) failover() error {
	// The operator sees the source gone before he decides.
	ctx, cancel := context.WithTimeout(t.ctx, 30*time.Second)
	defer cancel()
	if _, err := t.s.DR.AwaitGroup(ctx, vmName, "the source to be gone", func(g control.Group) bool { return !g.PeerUp }); err != nil {
		return err
	}
	if t.o.FromDisk { // the VM mounts the disk as soon as it starts
		if err := t.s.DR.Lab.BeforeStart(fmt.Sprintf("cp --sparse=always '%s' '%s'", t.replicaImage(), t.replayedImage())); err != nil {
			return err
		}
	}
	if err := t.show(t.s.DR, "failover", vmName); err != nil {
		return err
	}
	g, err := t.s.DR.Group(t.ctx, vmName)
	if err != nil {
		return err
	}
	if g.Failover == nil {
		return fmt.Errorf("status shows no failover")
	}
	t.sum.Report = *g.Failover
	if t.sum.Report.Replayed == 0 {
		return fmt.Errorf("no journal was replayed, although the guest was killed while it wrote")
	}
	return nil
}

func (t *story) replicaImage() string {
	return filepath.Join(t.s.DR.StateDir(), "images", vmName, t.disk+".raw")
}

// replayedImage is the disk as the replay of the journals left it: a copy made
// before the VM started, or the image itself, which the VM has not mounted yet.
func (t *story) replayedImage() string {
	if t.o.FromDisk {
		return filepath.Join(t.drDir, "replayed.raw")
	}
	return t.replicaImage()
}

func (t *story) fsck() error {
	err := t.e2fsck(t.replayedImage())
	t.sum.FSClean = err == nil
	return err
}

func (t *story) e2fsck(image string) error {
	if t.o.FromDisk {
		image = fmt.Sprintf("%s?offset=%d", image, guest.RootOffset)
	}
	out, err := exec.CommandContext(t.ctx, "e2fsck", "-fn", image).CombinedOutput()
	if err != nil {
		return fmt.Errorf("e2fsck -fn: %w: %s", err, out)
	}
	t.say("   e2fsck -fn: clean")
	return nil
}

// identity looks at what the replica VM is, in libvirt and from inside.
func (t *story) identity() error {
	out, err := exec.CommandContext(t.ctx, "virsh", "-q", "-c", t.s.DR.Lab.URI, "dumpxml", replicaName).Output()
	if err != nil {
		return fmt.Errorf("definition of the replica VM: %w", err)
	}
	var d libvirtxml.Domain
	if err := d.Unmarshal(string(out)); err != nil {
		return err
	}
	if d.Devices == nil || len(d.Devices.Interfaces) != 1 {
		return fmt.Errorf("the replica VM has not one network card: %s", out)
	}
	nic := d.Devices.Interfaces[0]
	if nic.MAC == nil || nic.Source == nil || nic.Source.Network == nil {
		return fmt.Errorf("the replica VM's network card: %+v", nic)
	}
	inside := ""
	err = t.atConsole(t.drDir, func(c *guest.Console) error {
		inside, err = c.Run(t.ctx, "cat /sys/class/net/eth0/address")
		return err
	})
	if err != nil {
		return err
	}
	got := []string{d.Name, d.UUID, nic.Source.Network.Network, nic.MAC.Address, strings.TrimSpace(inside)}
	if want := []string{replicaName, vmUUID, replicaNetwork, vmMAC, vmMAC}; !slices.Equal(got, want) {
		return fmt.Errorf("the replica VM's name, UUID, network, MAC, and MAC seen inside: %q, want %q", got, want)
	}
	t.say("   %s, UUID as before, MAC as before, on network %s (at the source: %s)", d.Name, replicaNetwork, sourceNetwork)
	return nil
}

func (t *story) check() error {
	return t.atConsole(t.drDir, func(c *guest.Console) error {
		if err := t.mount(c); err != nil {
			return err
		}
		var err error
		if t.sum.Found, err = c.Check(t.ctx, t.dataDir()); err != nil {
			return err
		}
		t.sum.Checked = true
		t.sum.Lost = lost(t.sum.Acked.Append, t.sum.Found.Append.Highest) + lost(t.sum.Acked.Blocks, t.sum.Found.Blocks.Highest)
		t.say("   found intact: %d appends, %d overwrites; damage: %d", t.sum.Found.Append.Highest, t.sum.Found.Blocks.Highest,
			len(t.sum.Found.Append.Damage)+len(t.sum.Found.Blocks.Damage))
		if t.sum.Lost > 0 || !t.sum.Found.OK() {
			return fmt.Errorf("%d acknowledged records are lost: %s", t.sum.Lost, t.sum.Found)
		}
		if t.o.FromDisk {
			return nil
		}
		_, err = c.Run(t.ctx, "umount %s", t.dataDir())
		return err
	})
}

func lost(acked, found uint64) uint64 {
	if found >= acked {
		return 0
	}
	return acked - found
}

// comeBack starts the lost site's daemon on what the disaster has left there.
func (t *story) comeBack() error {
	t.s.Link.Restore()
	if err := t.s.Main.Start(t.ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(t.ctx, time.Minute)
	defer cancel()
	if _, err := t.s.Main.AwaitGroup(ctx, vmName, "the old source to be fenced", func(g control.Group) bool { return g.State == "fenced" }); err != nil {
		return err
	}
	err := t.atConsole(t.drDir, func(c *guest.Console) error {
		if err := t.mount(c); err != nil {
			return err
		}
		_, err := c.Run(t.ctx, "writer start %s every=2 slots=256", t.dataDir())
		return err
	})
	if err != nil {
		return err
	}
	for _, args := range [][]string{{"reprotect", vmName, "--dry-run"}, {"reprotect", vmName}, {"status"}} {
		if err := t.show(t.s.DR, args...); err != nil {
			return err
		}
	}
	g, err := t.s.DR.AwaitGroup(ctx, vmName, "protection by the old site", func(g control.Group) bool { return g.Protected && g.State == "streaming" })
	if err != nil {
		return err
	}
	t.sum.ReturnBytes, t.sum.DiskBytes = g.Resynced, uint64(g.Disks[0].Size)
	if t.sum.ReturnBytes == 0 || !t.o.FromDisk && t.sum.ReturnBytes > ballastBytes/2 {
		return fmt.Errorf("%d bytes were shipped for the return: that is no delta", t.sum.ReturnBytes)
	}
	return t.show(t.s.Main, "branches", vmName)
}

// goHome lets the guest write under protection, shuts it down, and moves it.
func (t *story) goHome() error {
	time.Sleep(t.o.Load / 2)
	_ = t.atConsole(t.drDir, func(c *guest.Console) error {
		_, err := c.Run(t.ctx, "stop")
		return err // the connection may end before the answer comes
	})
	ctx, cancel := context.WithTimeout(t.ctx, bootPatience)
	defer cancel()
	if _, err := t.s.DR.AwaitGroup(ctx, vmName, "the VM to stop", func(g control.Group) bool { return g.Disks[0].Clients == 0 }); err != nil {
		return err
	}
	acks, err := workload.ReadAcksFile(filepath.Join(t.drDir, guest.AckFile))
	if err != nil {
		return err
	}
	if len(acks.Errors) > 0 || acks.Append <= t.sum.Found.Append.Highest {
		return fmt.Errorf("the guest wrote nothing at the other site, or saw errors: %+v", acks)
	}
	t.sum.AckedThere = acks
	if err := t.show(t.s.DR, "failback", vmName); err != nil {
		return err
	}
	return t.show(t.s.Main, "status")
}

func (t *story) checkHome() error {
	ctx, cancel := context.WithTimeout(t.ctx, time.Minute)
	defer cancel()
	if _, err := t.s.Main.AwaitGroup(ctx, vmName, "protection at home", func(g control.Group) bool { return g.Protected && g.State == "streaming" }); err != nil {
		return err
	}
	return t.atConsole(t.mainDir, func(c *guest.Console) error {
		if err := t.mount(c); err != nil {
			return err
		}
		found, err := c.Check(t.ctx, t.dataDir())
		if err != nil {
			return err
		}
		t.say("   found intact: %d appends, %d overwrites; acknowledged at the other site: up to %d and %d", found.Append.Highest, found.Blocks.Highest, t.sum.AckedThere.Append, t.sum.AckedThere.Blocks)
		n := lost(t.sum.AckedThere.Append, found.Append.Highest) + lost(t.sum.AckedThere.Blocks, found.Blocks.Highest)
		if t.sum.Lost += n; n > 0 || !found.OK() {
			return fmt.Errorf("%d acknowledged records are lost at home: %s", n, found)
		}
		return nil
	})
}

// stop stops the VM cleanly where it runs, and looks at what it left.
func (t *story) stop() error {
	if t.o.Keep {
		t.say("   left out: the VM is kept running")
		return nil
	}
	site, dir := t.s.DR, t.drDir
	if t.o.Home {
		site, dir = t.s.Main, t.mainDir
	}
	_ = t.atConsole(dir, func(c *guest.Console) error {
		_, err := c.Run(t.ctx, "stop")
		return err // the connection may end before the answer comes
	})
	ctx, cancel := context.WithTimeout(t.ctx, bootPatience)
	defer cancel()
	g, err := site.AwaitGroup(ctx, vmName, "the VM to stop", func(g control.Group) bool { return g.Disks[0].Clients == 0 })
	if err != nil {
		return err
	}
	return t.e2fsck(g.Disks[0].Image)
}
