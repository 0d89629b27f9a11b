package config

import (
	"path/filepath"
	"time"
)

// Modes of a group.
const (
	ModeSync     = "sync"
	LossStall    = "stall"
	LossContinue = "continue"
	ModeAsync    = "async"
)

// MaxAsyncAge is the longest that a replica may be behind in mode async.
const MaxAsyncAge = time.Hour

// DefaultPath is where the daemon and the command line look for the file.
const DefaultPath = "/etc/kagami/kagami.yaml"

// Defaults of the file's keys.
const (
	DefaultStateDir    = "/var/lib/kagami"
	DefaultRunDir      = "/run/kagami"
	DefaultListen      = ":7400"
	DefaultCA          = "/etc/kagami/pki/ca.crt"
	DefaultCert        = "/etc/kagami/pki/site.crt"
	DefaultKey         = "/etc/kagami/pki/site.key"
	DefaultLibvirtURI  = "qemu:///system"
	DefaultSocketGroup = "libvirt-qemu"
	DefaultConnections = 4
	DefaultMode        = ModeSync
	DefaultOnLinkLoss  = LossStall
	DefaultAsyncAge    = 5 * time.Second
	DefaultDomainUUID  = "keep"
	DefaultDomainMAC   = "keep"
)

// ControlSocketName is the control socket's name in RunDir.
const ControlSocketName = "control.sock"

// DefaultLimits are the limits of a file that names none.
func DefaultLimits() Limits {
	return Limits{
		QueueBytes: 16 << 20, InflightBytes: 8 << 20,
		SpoolBytes: 2 << 30, SegmentBytes: 64 << 20, ActiveLogBytes: 1 << 30, BacklogBytes: 4 << 30,
		EpochBytes: 4 << 20, ApplyBytes: 64 << 20,
		EpochAge: time.Second, ApplyAge: 2 * time.Second,
		Heartbeat: time.Second, LinkTimeout: 5 * time.Second, ReconnectDelay: time.Hour,
		Compression: "zstd",
	}
}

// Default is the configuration of an empty file. It has no site and no peers.
func Default() *Config {
	return &Config{
		StateDir: DefaultStateDir, RunDir: DefaultRunDir, Listen: DefaultListen,
		TLS: TLS{CA: DefaultCA, Cert: DefaultCert, Key: DefaultKey},
		Libvirt: Libvirt{
			URI: DefaultLibvirtURI, SocketGroup: DefaultSocketGroup, Enabled: true, Emulation: "auto",
		},
		Ext4:   Ext4{Follow: true, LocalFlushes: true},
		Verify: Verify{Rate: 32 << 20},
		Limits: DefaultLimits(),
		Log:    Log{Level: "info", Format: "auto"},
	}
}

// fill sets what was left out of the control socket, peers and groups. given
// tells whether the file or the environment named a key.
func (c *Config) fill(given func(path string) bool) {
	if c.Control.Socket == "" {
		c.Control.Socket = filepath.Join(c.RunDir, ControlSocketName)
	}
	if !c.Libvirt.Enabled && !given("libvirt.socket_group") {
		c.Libvirt.SocketGroup = "" // there is no QEMU to let in
	}
	for i := range c.Peers {
		if !given(at("peers", i, "connections")) {
			c.Peers[i].Connections = DefaultConnections
		}
	}
	for i := range c.Groups {
		c.Groups[i].fill(c, at("groups", i), given)
	}
}

func (g *Group) fill(c *Config, path string, given func(path string) bool) {
	orDefault(&g.Mode, DefaultMode)
	orDefault(&g.OnLinkLoss, DefaultOnLinkLoss)
	if g.AsyncAge == 0 {
		g.AsyncAge = DefaultAsyncAge
	}
	if d := g.Domain; d != nil {
		orDefault(&d.UUID, DefaultDomainUUID)
		orDefault(&d.MAC, DefaultDomainMAC)
	}
	for i := range g.Disks {
		orDefault(&g.Disks[i].Socket, c.DiskSocket(g.Name, g.Disks[i].Name))
	}
	if g.Limits != nil {
		inherit(g.Limits, c.Limits, func(key string) bool { return given(path + ".limits." + key) })
	}
}

func orDefault(s *string, def string) {
	if *s == "" {
		*s = def
	}
}

// DiskSocket is the NBD socket of a disk that names none.
func (c *Config) DiskSocket(group, disk string) string {
	return filepath.Join(c.RunDir, group+"-"+disk+".sock")
}

// Group finds a group by name.
func (c *Config) Group(name string) (Group, bool) {
	for _, g := range c.Groups {
		if g.Name == name {
			return g, true
		}
	}
	return Group{}, false
}

// Peer finds a peer by name.
func (c *Config) Peer(name string) (Peer, bool) {
	for _, p := range c.Peers {
		if p.Name == name {
			return p, true
		}
	}
	return Peer{}, false
}

// LimitsFor is what bounds a group: its own limits, or the file's. The group
// need not be in the file.
func (c *Config) LimitsFor(group string) Limits {
	if g, ok := c.Group(group); ok && g.Limits != nil {
		return *g.Limits
	}
	return c.Limits
}
