// Package config is kagami's configuration file: one YAML file, typed,
// validated, with defaults and environment overrides. It is the only user of
// viper.
//
// What comes out of Load is complete: every default is filled in, every path
// is absolute, every name is checked, every reference (a group's peer) exists.
// Nothing is guessed: a key this release does not know, a value of another
// type, and a value that cannot work are refused, all of them at once, each
// with file, line, key, value and what is allowed.
//
// Sizes are bytes; in the file they are written with a unit (10GiB, 512KiB,
// 4096B). Durations are written as Go writes them (1s, 250ms, 1h).
package config

import "time"

// Config is the whole file.
type Config struct {
	// Site is this site's name; peers and certificates know it by that name.
	Site string `mapstructure:"site"`
	// StateDir holds what must survive; RunDir sockets only.
	StateDir string `mapstructure:"state_dir"`
	RunDir   string `mapstructure:"run_dir"`
	// Listen is the TCP address that peers connect to, host:port.
	Listen  string  `mapstructure:"listen"`
	Control Control `mapstructure:"control"`
	// Metrics is a TCP address for Prometheus; "" serves metrics on the
	// control socket only.
	Metrics string  `mapstructure:"metrics"`
	TLS     TLS     `mapstructure:"tls"`
	Libvirt Libvirt `mapstructure:"libvirt"`
	Peers   []Peer  `mapstructure:"peers"`
	Groups  []Group `mapstructure:"groups"`
	Ext4    Ext4    `mapstructure:"ext4"`
	Verify  Verify  `mapstructure:"verify"`
	Limits  Limits  `mapstructure:"limits"`
	Log     Log     `mapstructure:"log"`
}

// Control is the control API's unix socket. Its mode is 0660.
type Control struct {
	Socket string `mapstructure:"socket"` // default RunDir/control.sock
	Group  string `mapstructure:"group"`  // group that owns the socket; "" leaves the daemon's
}

// TLS names the PEM files made by `kagami pki`.
type TLS struct {
	CA   string `mapstructure:"ca"`
	Cert string `mapstructure:"cert"`
	Key  string `mapstructure:"key"`
}

// Libvirt is how VMs are reached.
type Libvirt struct {
	URI string `mapstructure:"uri"`
	// SocketGroup is the group QEMU runs as; the NBD sockets belong to it.
	SocketGroup string `mapstructure:"socket_group"`
	Enabled     bool   `mapstructure:"enabled"`
	// Emulation is the domain type of replicas started here: auto (qemu where libvirt offers no KVM), kvm or qemu.
	Emulation string `mapstructure:"emulation" oneof:"auto|kvm|qemu"`
}

// Ext4 is what is made of knowing the guests' file systems. Nothing of it changes
// what is replicated, or which fsync is safe when it returns.
type Ext4 struct {
	Follow bool `mapstructure:"follow"` // follow ext4 and its journal in the stream of writes
	// LocalFlushes answers a flush that promises nothing without waiting for the
	// other site; it needs Follow.
	LocalFlushes bool `mapstructure:"local_flushes"`
}

// Verify is how the groups whose VMs run here are compared with their replicas without
// being asked for.
type Verify struct {
	Every time.Duration `mapstructure:"every" min:"0s" max:"8760h"`                         // 0: never
	Rate  int64         `mapstructure:"rate" unit:"size" min:"1048576" max:"1099511627776"` // bytes a second
}

// Peer is another site.
type Peer struct {
	Name        string `mapstructure:"name"`
	Address     string `mapstructure:"address"`                      // host:port of its Listen
	Connections int    `mapstructure:"connections" min:"1" max:"32"` // TCP connections to it
}

// Group is the disks of one VM, replicated as one ordered stream. Its name is
// the libvirt domain's, unless it declares disks that belong to no VM.
type Group struct {
	Name string `mapstructure:"name"`
	Peer string `mapstructure:"peer"` // may be empty without declared disks
	Mode string `mapstructure:"mode" oneof:"sync|async"`
	// AsyncBytes and AsyncAge are what the replica may lack in mode async; 0 bytes:
	// what the queue holds.
	AsyncBytes int64         `mapstructure:"async_bytes" unit:"size" min:"0" max:"1099511627776"`
	AsyncAge   time.Duration `mapstructure:"async_age" min:"100ms" max:"1h"`
	OnLinkLoss string        `mapstructure:"on_link_loss" oneof:"stall|continue"`
	Disks      []Disk        `mapstructure:"disks"`
	Domain     *Domain       `mapstructure:"domain"`
	// Limits overrides the file's limits; after Load it is nil or complete.
	Limits *Limits `mapstructure:"limits"`
}

// Disk is a declared disk: an image that any NBD client may use.
type Disk struct {
	Name   string `mapstructure:"name"`
	Image  string `mapstructure:"image"`
	Size   int64  `mapstructure:"size" unit:"size" min:"0"` // bytes; 0: the image's
	Socket string `mapstructure:"socket"`                   // default RunDir/GROUP-DISK.sock
}

// Domain maps what a replica VM started at this site needs that does not come
// with its disks.
type Domain struct {
	Name string `mapstructure:"name"` // "": the source's
	UUID string `mapstructure:"uuid"` // keep, derive, or a UUID
	MAC  string `mapstructure:"mac" oneof:"keep|derive"`
	// Networks maps libvirt network or bridge names.
	Networks []Map `mapstructure:"networks"`
	// Paths maps prefixes of console, channel and file paths.
	Paths     []Map        `mapstructure:"paths"`
	Kernel    string       `mapstructure:"kernel"` // for direct boot; "": the source's path
	Initrd    string       `mapstructure:"initrd"`
	Cmdline   string       `mapstructure:"cmdline"`
	Disks     []DomainDisk `mapstructure:"disks"`
	Type      string       `mapstructure:"type" oneof:"|kvm|qemu"` // "": as libvirt.emulation says
	Autostart bool         `mapstructure:"autostart"`
	// QEMUArguments says whether a replica keeps what its definition gives to
	// QEMU past libvirt; "": such a VM is refused.
	QEMUArguments string `mapstructure:"qemu_arguments" oneof:"|keep|drop"`
}

// Map renames From to To.
type Map struct {
	From string `mapstructure:"from"`
	To   string `mapstructure:"to"`
}

// DomainDisk says what an unprotected disk of the source becomes here: a file
// of this site, or nothing.
type DomainDisk struct {
	Target string `mapstructure:"target"` // vda, vdb, …
	File   string `mapstructure:"file"`
	Format string `mapstructure:"format" oneof:"|raw|qcow2"` // "": raw
	Drop   bool   `mapstructure:"drop"`
}

// Limits bound memory, disk use and time. Sizes are bytes.
type Limits struct {
	QueueBytes     int64         `mapstructure:"queue_bytes" unit:"size" min:"1048576" max:"1099511627776"`
	InflightBytes  int64         `mapstructure:"inflight_bytes" unit:"size" min:"1048576" max:"1099511627776"` // per peer
	SpoolBytes     int64         `mapstructure:"spool_bytes" unit:"size" min:"1048576" max:"1125899906842624"`
	SegmentBytes   int64         `mapstructure:"segment_bytes" unit:"size" min:"1048576" max:"1073741824"`
	ActiveLogBytes int64         `mapstructure:"active_log_bytes" unit:"size" min:"1048576" max:"1125899906842624"` // bytes of regions that may be active
	BacklogBytes   int64         `mapstructure:"backlog_bytes" unit:"size" min:"0" max:"1125899906842624"`          // on_link_loss continue; 0: none
	ResyncRate     int64         `mapstructure:"resync_rate" unit:"size" min:"0" max:"1099511627776"`               // a second; 0: none
	EpochBytes     int64         `mapstructure:"epoch_bytes" unit:"size" min:"65536" max:"1073741824"`
	ApplyBytes     int64         `mapstructure:"apply_bytes" unit:"size" min:"65536" max:"1125899906842624"`
	EpochAge       time.Duration `mapstructure:"epoch_age" min:"10ms" max:"1m"`
	ApplyAge       time.Duration `mapstructure:"apply_age" min:"10ms" max:"1h"`
	Heartbeat      time.Duration `mapstructure:"heartbeat" min:"100ms" max:"1m"`
	LinkTimeout    time.Duration `mapstructure:"link_timeout" min:"500ms" max:"10m"`
	ReconnectDelay time.Duration `mapstructure:"reconnect_delay" min:"1s" max:"720h"` // how long QEMU waits for a daemon that is away
	Compression    string        `mapstructure:"compression" oneof:"zstd|none"`
}

// Log is how the daemon writes its log, to standard error.
type Log struct {
	Level  string `mapstructure:"level" oneof:"debug|info|warn|error"`
	Format string `mapstructure:"format" oneof:"auto|text|json"`
}
