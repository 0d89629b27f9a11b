package stage

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"kagami/tests/lab"
	"kagami/tests/wan"
)

// Options of a stage.
type Options struct {
	Kagami  string        // path of the kagami binary
	RTT     time.Duration // of the line; 20 ms when 0
	Rate    int64         // bit/s; 1 Gbit/s when 0
	Libvirt bool          // give each site a libvirt
	// Connections that each site makes to the other; the configuration's default when 0.
	Connections int
	// Extra is appended to each site's config file (YAML), by site name.
	Extra map[string]string
	// Disk gives a site a file system of its own of so many bytes, by site
	// name, so that PowerLoss can lose what its host never wrote out.
	Disk map[string]int64
}

// Stage is two sites and the line between them.
type Stage struct {
	Dir  string
	Link *wan.Link
	Main *Site // where the VM runs first
	DR   *Site
	o    Options
}

// Names of the two sites.
const (
	MainName = "main"
	DRName   = "dr"
)

// New builds a stage; its daemons are not started yet.
func New(ctx context.Context, o Options) (*Stage, error) {
	if o.RTT == 0 {
		o.RTT = 20 * time.Millisecond
	}
	if o.Rate == 0 {
		o.Rate = 1e9
	}
	dir, err := os.MkdirTemp("", "kagami-") // short: socket paths end at 107 bytes
	if err != nil {
		return nil, fmt.Errorf("make folder of stage: %w", err)
	}
	s := &Stage{Dir: dir, o: o}
	if err := s.build(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Stage) build(ctx context.Context) error {
	if err := os.Chmod(s.Dir, 0o755); err != nil { // QEMU's user passes through
		return fmt.Errorf("open folder of stage: %w", err)
	}
	id := filepath.Base(s.Dir)
	id = id[max(0, len(id)-6):]
	var err error
	s.Link, err = wan.New(wan.Config{
		Names:  [2]string{"kg-" + id + "-a", "kg-" + id + "-b"},
		Addrs:  [2]netip.Prefix{netip.MustParsePrefix("10.98.0.1/30"), netip.MustParsePrefix("10.98.0.2/30")},
		Params: wan.Symmetric(wan.Params{Delay: s.o.RTT / 2, Rate: s.o.Rate}),
		Seed:   1,
	})
	if err != nil {
		return fmt.Errorf("make the line between the sites: %w", err)
	}
	s.Main = &Site{stage: s, Name: MainName, side: wan.A, peer: DRName}
	s.DR = &Site{stage: s, Name: DRName, side: wan.B, peer: MainName}
	for _, site := range []*Site{s.Main, s.DR} {
		if err := site.build(ctx); err != nil {
			return fmt.Errorf("build site %s: %w", site.Name, err)
		}
	}
	return s.pair(ctx)
}

// pair makes the keys of both sites: the two commands of the manual.
func (s *Stage) pair(ctx context.Context) error {
	if _, err := s.Main.run(ctx, "pki", "init", "--site", MainName, "--dir", s.Main.path("pki")); err != nil {
		return err
	}
	if _, err := s.Main.run(ctx, "pki", "issue", DRName, "--dir", s.Main.path("pki"), "--out", s.DR.path("pki")); err != nil {
		return err
	}
	return nil
}

// Close ends the daemons, guests and libvirts, takes the line down and removes the folder.
func (s *Stage) Close() error {
	var errs []error
	for _, site := range []*Site{s.Main, s.DR} {
		if site != nil {
			errs = append(errs, site.close())
		}
	}
	if s.Link != nil {
		errs = append(errs, s.Link.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(s.Dir))...)
}

// Site is one of the two sites.
type Site struct {
	Name   string
	Lab    *lab.Lab
	stage  *Stage
	side   wan.Side
	peer   string
	daemon *exec.Cmd
	ended  chan error
	log    *os.File
	disk   string // image of the site's own file system; "" without one
}

func (s *Site) path(names ...string) string {
	return filepath.Join(append([]string{s.stage.Dir, s.Name}, names...)...)
}

// Config is the path of the site's config file.
func (s *Site) Config() string { return s.path("kagami.yaml") }

// StateDir is the site's state folder.
func (s *Site) StateDir() string { return s.path("state") }

// Socket is where the export of a disk is.
func (s *Site) Socket(group, disk string) string { return s.path("run", group+"-"+disk+".sock") }

func (s *Site) build(ctx context.Context) error {
	if err := os.MkdirAll(s.path(), 0o755); err != nil {
		return err
	}
	if err := s.makeDisk(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(s.path("run"), 0o755); err != nil {
		return err
	}
	if s.stage.o.Libvirt {
		var err error
		if s.Lab, err = lab.Start(ctx, lab.Options{NetNS: s.stage.Link.Name(s.side)}); err != nil {
			return fmt.Errorf("start libvirt: %w", err)
		}
	}
	return os.WriteFile(s.Config(), []byte(s.config()), 0o600)
}

func (s *Site) config() string {
	libvirt := "libvirt:\n  enabled: false\n  socket_group: \"\"\n"
	if s.Lab != nil {
		libvirt = fmt.Sprintf("libvirt:\n  enabled: true\n  uri: %s\n  socket_group: %s\n", s.Lab.URI, QEMUGroup())
	}
	connections := ""
	if n := s.stage.o.Connections; n > 0 {
		connections = fmt.Sprintf("    connections: %d\n", n)
	}
	return fmt.Sprintf(`site: %s
state_dir: %s
run_dir: %s
listen: %s:7400
tls:
  ca: %s
  cert: %s
  key: %s
peers:
  - name: %s
    address: %s:7400
%slog:
  level: debug
%s%s`, s.Name, s.StateDir(), s.path("run"), s.stage.Link.Addr(s.side), s.path("pki", "ca.crt"), s.path("pki", "site.crt"), s.path("pki", "site.key"),
		s.peer, s.stage.Link.Addr(s.side.Peer()), connections, libvirt, s.stage.o.Extra[s.Name])
}

// Start starts the site's daemon inside its network namespace and waits until
// it answers.
func (s *Site) Start(ctx context.Context) error {
	log, err := os.OpenFile(s.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	cmd := exec.Command(s.stage.o.Kagami, "daemon", "--config", s.Config())
	cmd.Stdout, cmd.Stderr = log, log
	if cmd, err = s.stage.Link.Command(s.side, cmd); err != nil {
		return errors.Join(err, log.Close())
	}
	if err := cmd.Start(); err != nil {
		return errors.Join(fmt.Errorf("start daemon of site %s: %w", s.Name, err), log.Close())
	}
	s.daemon, s.log, s.ended = cmd, log, make(chan error, 1)
	go func() { s.ended <- cmd.Wait() }()
	return s.awaitReady(ctx)
}

func (s *Site) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		if _, err := s.run(ctx, "status", "--json"); err == nil {
			return nil
		}
		select {
		case err := <-s.ended:
			s.ended <- err
			return fmt.Errorf("daemon of site %s ended: %w; its log: %s", s.Name, err, s.tail())
		case <-ctx.Done():
			return fmt.Errorf("daemon of site %s does not answer; its log: %s", s.Name, s.tail())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// LogPath is the daemon's log.
func (s *Site) LogPath() string { return s.path() + ".log" }

func (s *Site) tail() string {
	b, err := os.ReadFile(s.LogPath())
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-4000):])
}

// Kill ends the daemon by SIGKILL. What it wrote to files stays; see PowerLoss.
func (s *Site) Kill() error { return s.end(os.Kill) }

// Stop ends the daemon cleanly.
func (s *Site) Stop() error { return s.end(syscall.SIGTERM) }

func (s *Site) end(sig os.Signal) error {
	if s.daemon == nil {
		return nil
	}
	if err := s.daemon.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	var err error
	select {
	case err = <-s.ended:
	case <-time.After(60 * time.Second):
		_ = s.daemon.Process.Kill() // it did not end by itself: reported below
		err = fmt.Errorf("daemon of site %s did not end within 60 s: %w", s.Name, <-s.ended)
	}
	s.daemon = nil
	if sig == os.Kill {
		err = nil // "signal: killed" is what was asked for
	}
	return errors.Join(err, s.log.Close())
}

// PID is the daemon's process.
func (s *Site) PID() int { return s.daemon.Process.Pid }

func (s *Site) close() error {
	errs := []error{s.Kill()}
	if s.Lab != nil {
		errs = append(errs, s.Lab.Stop())
	}
	errs = append(errs, s.unmount())
	return errors.Join(errs...)
}

// Kagami runs a kagami command at this site and returns what it printed.
func (s *Site) Kagami(ctx context.Context, args ...string) (string, error) {
	return s.run(ctx, args...)
}

func (s *Site) run(ctx context.Context, args ...string) (string, error) {
	out, err := s.Command(ctx, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("kagami %v at site %s: %w: %s", args, s.Name, err, out)
	}
	return string(out), nil
}

// Command is a kagami command at this site, ready to be started.
func (s *Site) Command(ctx context.Context, args ...string) *exec.Cmd {
	if args[0] != "pki" && args[0] != "config" {
		args = append(args, "--socket", s.Control())
	}
	return exec.CommandContext(ctx, s.stage.o.Kagami, args...)
}
