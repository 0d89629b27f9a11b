package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/appliance/nbd"
	"kagami/appliance/pki"
	"kagami/appliance/ship"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica"
	"kagami/replica/wire"
)

// Daemon is one running kagami: every group of one site.
type Daemon struct {
	cfg     *config.Config
	release string
	fs      images.FS
	log     *slog.Logger
	siteID  epoch.UUID
	codec   *wire.Codec
	started time.Time
	server  *replica.Server
	links   map[string]*ship.Link // by peer site

	// nbdMemory bounds the memory of the requests of all exports.
	nbdMemory *nbd.Budget

	pause pauses
	// bootID names this start of the host.
	bootID string
	// dial connects to libvirt; nil where it is not enabled.
	dial func(context.Context) (Hypervisor, error)

	making sync.Mutex // held while a peer's group is made or checked; taken before mu

	// reships has one token: definitions are shipped again one at a time, so that
	// a peer whose libvirt is slow has room for what groups cannot wait for.
	reships chan struct{}

	mu     sync.Mutex
	groups map[string]*group // by name
	taken  map[string]bool   // names of groups that are being made
	hv     Hypervisor        // see virt; nil while libvirt is not reachable
	hvErr  error             // why not
	ctx    context.Context   // ends when the daemon stops
	wg     sync.WaitGroup
}

// drainPatience bounds how long a stopping daemon waits for the replica to
// have everything. A drain that does not end in time costs the next start a
// compare of the active regions, nothing else.
const drainPatience = 20 * time.Second

// Run is the daemon: it serves until ctx ends, then stops cleanly. What it has
// acknowledged is safe whenever and however it ends.
func Run(ctx context.Context, cfg *config.Config, release string, log *slog.Logger) error {
	err := newDaemon(cfg, release, images.OS{}, log).run(ctx)
	return explained(err, "put that right, then start the daemon again; its log (journalctl -u kagami) has more")
}

// bootID is the kernel's name for this start of the host; where it has none, one that
// no other start of the daemon has.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if id := strings.TrimSpace(string(b)); err == nil && id != "" {
		return id
	}
	return epoch.NewUUID().String()
}

// newDaemon makes a daemon that has touched nothing yet.
func newDaemon(cfg *config.Config, release string, fsys images.FS, log *slog.Logger) *Daemon {
	d := &Daemon{cfg: cfg, release: release, fs: fsys, log: log, started: time.Now(),
		links: map[string]*ship.Link{}, groups: map[string]*group{}, taken: map[string]bool{}, pause: usualPauses, bootID: bootID(),
		nbdMemory: nbd.NewBudget(nbdMemory), reships: make(chan struct{}, 1)}
	if cfg.Libvirt.Enabled {
		d.dial = func(ctx context.Context) (Hypervisor, error) { return dialLibvirt(ctx, cfg.Libvirt.URI) }
	}
	return d
}

func (d *Daemon) run(ctx context.Context) error {
	lock, err := d.claim()
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }() // holds only a lock
	if d.codec, err = wire.NewCodec(); err != nil {
		return err
	}
	d.connectHypervisor(ctx)
	return d.serve(ctx)
}

// claim makes the folders, takes the state folder for this process, and reads
// or makes the site's identity.
func (d *Daemon) claim() (images.File, error) {
	for _, dir := range []string{d.cfg.StateDir + "/groups", d.cfg.StateDir + "/images"} {
		if err := d.fs.MkdirAll(dir, 0o700); err != nil {
			return nil, refused(fmt.Sprintf("make state folder: %v", err), "put state_dir right in the config file, or let the daemon's user write there")
		}
	}
	// QEMU's user must reach the sockets, and the images stay private.
	if err := d.fs.MkdirAll(d.cfg.RunDir, 0o755); err != nil {
		return nil, refused(fmt.Sprintf("make run folder: %v", err), "put run_dir right in the config file, or let the daemon's user write there")
	}
	lock, err := openOrCreate(d.fs, d.cfg.StateDir+"/lock")
	if err != nil {
		return nil, refused(fmt.Sprintf("open lock of state folder: %v", err), "let the daemon's user write in state_dir")
	}
	if err := lock.Lock(); err != nil {
		_ = lock.Close()
		return nil, refused(fmt.Sprintf("another daemon uses the state folder %s: %v", d.cfg.StateDir, err),
			"stop that daemon first, or give this one a state_dir of its own")
	}
	if err := d.identify(); err != nil {
		_ = lock.Close()
		return nil, err
	}
	return lock, nil
}

func openOrCreate(fsys images.FS, name string) (images.File, error) {
	f, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return fsys.Create(name, 0o600)
	}
	return f, err
}

type siteFile struct {
	Version int        `json:"version"`
	ID      epoch.UUID `json:"id"`
	Site    string     `json:"site"`
}

func (d *Daemon) identify() error {
	name := d.cfg.StateDir + "/site.json"
	b, err := images.ReadFile(d.fs, name, 1<<16)
	if errors.Is(err, fs.ErrNotExist) {
		d.siteID = epoch.NewUUID()
		b, err = json.Marshal(siteFile{Version: 1, ID: d.siteID, Site: d.cfg.Site})
		if err != nil {
			return fmt.Errorf("encode site identity: %w", err)
		}
		if err := images.WriteFileAtomic(d.fs, name, b, 0o600); err != nil {
			return fmt.Errorf("save site identity: %w", err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read site identity: %w", err)
	}
	var s siteFile
	if err := json.Unmarshal(b, &s); err != nil {
		return failure("damaged", fmt.Sprintf("site identity %s is damaged: %v", name, err), "remove it and start the daemon: a new one is made, and no group depends on it")
	}
	if s.Version != 1 {
		return fmt.Errorf("site identity %s has version %d, this release reads 1", name, s.Version)
	}
	if s.Site != d.cfg.Site {
		return refused(fmt.Sprintf("state folder %s belongs to site %q, the config file says %q", d.cfg.StateDir, s.Site, d.cfg.Site),
			"put the site's name right in the config file, or give this site a state_dir of its own")
	}
	d.siteID = s.ID
	return nil
}

// serve starts everything in the order in which it depends on each other and
// stops it in the reverse order.
func (d *Daemon) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.ctx = ctx
	files := pki.Files{CA: d.cfg.TLS.CA, Cert: d.cfg.TLS.Cert, Key: d.cfg.TLS.Key}
	peers, err := d.listenPeers(files)
	if err != nil {
		return err
	}
	api, err := control.Listen(d.cfg.Control.Socket, d.cfg.Control.Group)
	if err != nil {
		_ = peers.Close() // nobody has connected
		return refused(fmt.Sprintf("open control socket: %v", err), "put control.socket or control.group right in the config file (kagami config check), or stop the daemon that uses it")
	}
	if err := d.makeLinks(files); err != nil {
		return errors.Join(err, peers.Close(), api.Close())
	}
	if err := d.openGroups(); err != nil {
		d.stopGroups()
		return errors.Join(err, peers.Close(), api.Close())
	}
	scrape, err := d.listenMetrics()
	if err != nil {
		d.stopGroups()
		return errors.Join(err, peers.Close(), api.Close())
	}
	linkCtx, stopLinks := context.WithCancel(context.Background())
	defer stopLinks()
	for _, l := range d.links {
		d.wg.Go(func() { l.Run(linkCtx) })
	}
	failed := make(chan error, 3)
	if scrape != nil {
		d.wg.Go(func() { failed <- scrape.serve() })
	}
	d.startGroups() // before anybody asks for them: connections wait meanwhile
	d.wg.Go(func() { failed <- d.server.Serve(peers) })
	web := d.controlServer()
	d.wg.Go(func() { failed <- web.Serve(api) })
	d.watchHypervisor(ctx)
	d.wg.Go(func() { d.verifyRegularly(ctx) })
	d.log.Info("ready", "site", d.cfg.Site, "listen", peers.Addr().String(), "release", d.release)
	notify(daemon.SdNotifyReady)
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	notify(daemon.SdNotifyStopping)
	d.log.Info("stopping")
	cancel()
	web.Close()
	if scrape != nil {
		err = errors.Join(err, scrape.close())
	}
	d.drainGroups() // needs the links
	stopLinks()
	err = errors.Join(err, ignoreClosed(peers.Close()))
	d.server.Close()
	d.stopGroups()
	d.wg.Wait()
	d.closeHypervisor()
	d.log.Info("stopped")
	return err
}

func notify(state string) {
	// Without systemd there is nobody to tell; with it, a failure to tell is
	// noticed by systemd's own time-out.
	_, _ = daemon.SdNotify(false, state)
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// listenPeers opens the TCP port for peers; TLS is added per connection by Identify.
func (d *Daemon) listenPeers(files pki.Files) (net.Listener, error) {
	tlsConf, err := pki.ServerConfig(files)
	if err != nil {
		return nil, refused(fmt.Sprintf("TLS set-up: %v", err), "make this site's certificate (kagami pki --help), or put tls right in the config file")
	}
	if err := d.ownCertificate(files); err != nil {
		return nil, err
	}
	d.server = replica.NewServer(replica.ServerOptions{Backend: &acceptor{d: d, tls: tlsConf}, Codec: d.codec, Site: d.cfg.Site, SiteID: d.siteID,
		Release: d.release, Timeout: d.cfg.Limits.LinkTimeout, Event: func(t string) { d.log.Warn(t) }})
	lc := net.ListenConfig{Control: socketOptions}
	l, err := lc.Listen(context.Background(), "tcp", d.cfg.Listen)
	if err != nil {
		return nil, refused(fmt.Sprintf("listen for peers: %v", err), "stop what listens there (ss -ltnp shows it), or change listen in the config file")
	}
	return l, nil
}

// ownCertificate refuses the certificate of another site: peers would take
// this site for that one, and refuse or, worse, accept it.
func (d *Daemon) ownCertificate(files pki.Files) error {
	id, _, err := pki.Own(files)
	if err != nil {
		return fmt.Errorf("TLS set-up: %w", err)
	}
	if id.Site != d.cfg.Site {
		return refused(fmt.Sprintf("%s is the certificate of site %s, and this is site %s", files.Cert, id.Site, d.cfg.Site),
			fmt.Sprintf("put site right in the config file, or install the certificate that kagami pki issue %s makes", d.cfg.Site))
	}
	return nil
}

func (d *Daemon) makeLinks(files pki.Files) error {
	for _, p := range d.cfg.Peers {
		dial, err := dialer(files, p)
		if err != nil {
			return err
		}
		d.links[p.Name] = ship.NewLink(ship.Options{Dial: dial, Peer: p.Name, Site: d.cfg.Site, SiteID: d.siteID, Release: d.release,
			Connections: p.Connections, InflightBytes: d.cfg.Limits.InflightBytes, Heartbeat: d.cfg.Limits.Heartbeat,
			Timeout: d.cfg.Limits.LinkTimeout, Codec: d.codec, Compress: d.cfg.Limits.Compression == "zstd",
			Event: func(t string) { d.log.Info(t) }})
	}
	return nil
}

// openGroups loads every group of the state folder, then adds the declared ones that are new.
func (d *Daemon) openGroups() error {
	names, err := d.fs.ReadDir(d.cfg.StateDir + "/groups")
	if err != nil {
		return fmt.Errorf("list groups: %w", err)
	}
	for _, name := range names {
		if !validName.MatchString(name) {
			continue
		}
		dir := filepath.Join(d.cfg.StateDir, "groups", name)
		f, err := loadGroupFile(d.fs, dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a group whose making was broken off: its file is its beginning
		}
		if err == nil && f.Name != name {
			err = fmt.Errorf("group file in %s is of group %q", dir, f.Name)
		}
		if err != nil { // the other groups go on
			f = &groupFile{Name: name}
		}
		g := newGroup(d, f)
		g.broken = err
		d.groups[name] = g
	}
	d.declareGroups()
	return nil
}

// startGroups starts what the groups' roles ask for. A group that cannot start
// is failed and says why; the others go on.
func (d *Daemon) startGroups() {
	for _, g := range d.snapshot() {
		if err := g.start(); err != nil {
			g.fail(imageTrouble(err))
		}
	}
}

// drainGroups gives every source the chance to stop with nothing to resync.
func (d *Daemon) drainGroups() {
	ctx, cancel := context.WithTimeout(context.Background(), drainPatience)
	defer cancel()
	var wg sync.WaitGroup
	for _, g := range d.snapshot() {
		wg.Go(func() { g.drain(ctx) })
	}
	wg.Wait()
}

func (d *Daemon) stopGroups() {
	for _, g := range d.snapshot() {
		if err := g.stop(); err != nil {
			d.log.Error("stop group", "group", g.name, "error", err)
		}
	}
}

func (d *Daemon) snapshot() []*group {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*group, 0, len(d.groups))
	for _, g := range d.groups {
		out = append(out, g)
	}
	return out
}

func (d *Daemon) find(name string) *group {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.groups[name]
}

// lookup finds a group for an operation that an operator asked for.
func (d *Daemon) lookup(name string) (*group, error) {
	g := d.find(name)
	if g == nil {
		return nil, notFound(fmt.Sprintf("site %s has no group %s", d.cfg.Site, name), "kagami status lists the groups of this site")
	}
	if g.broken != nil {
		return nil, g.unusable()
	}
	return g, nil
}

// operate finds a group for an operator's command, and takes its op, which the caller
// gives back.
func (d *Daemon) operate(name string) (*group, error) {
	g, err := d.lookup(name)
	if err == nil && !g.op.TryLock() {
		err = refused("another operation is under way on "+g.name, "wait for it; see kagami status "+g.name)
	}
	return g, err
}

// unusable refuses a group that is broken.
func (g *group) unusable() error {
	var e *control.Error
	if errors.As(g.broken, &e) {
		return e
	}
	return failure("failed", fmt.Sprintf("the state of %s cannot be read: %v", g.name, g.broken),
		fmt.Sprintf("put the group's folder right, or restore it, and restart the daemon; or give it up with kagami forget %s", g.name))
}

// take reserves the name of a group that is about to be made; the caller
// gives it back with untake. A group of that name, or another attempt, is an error.
func (d *Daemon) take(name string) (*group, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if g := d.groups[name]; g != nil {
		return g, errTaken
	}
	if d.taken[name] {
		return nil, errTaken
	}
	d.taken[name] = true
	return nil, nil
}

var errTaken = errors.New("the name is taken")

func (d *Daemon) untake(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.taken, name)
}

// add puts a group whose file exists into the daemon's list.
func (d *Daemon) add(g *group) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.groups[g.name] = g
}

// forget takes a group out of the daemon's list. A request that still holds it
// stores nothing for it: its folder may be another group's soon.
func (d *Daemon) forget(g *group) {
	g.mu.Lock()
	g.gone = true
	g.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.groups[g.name] == g {
		delete(d.groups, g.name)
	}
}

// groupConfig returns the config file's section for a group, or nil.
func (d *Daemon) groupConfig(name string) *config.Group {
	for i := range d.cfg.Groups {
		if d.cfg.Groups[i].Name == name {
			return &d.cfg.Groups[i]
		}
	}
	return nil
}

func (d *Daemon) limits(name string) config.Limits {
	if c := d.groupConfig(name); c != nil && c.Limits != nil {
		return *c.Limits
	}
	return d.cfg.Limits
}
