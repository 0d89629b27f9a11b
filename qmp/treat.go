package qmp

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	gq "github.com/digitalocean/go-qemu/qmp"
	"github.com/digitalocean/go-qemu/qmp/raw"
)

// The reconnect treatment. libvirt makes an NBD disk of two nodes, a raw "format" node
// over an nbd "storage" node, and cannot say reconnect-delay (libvirt 9.0 drops it).
// The nodes are rebuilt under libvirt's own names, so that its block jobs, detach
// and restarts of libvirtd go on working:
//
//	1 blockdev-add     temporary nbd node with reconnect-delay
//	2 blockdev-reopen  format node onto the temporary node
//	3 blockdev-del     libvirt's storage node
//	4 blockdev-add     storage node again, now with reconnect-delay
//	5 blockdev-reopen  format node onto the storage node
//	6 blockdev-del     the temporary node
//
// QEMU does not tell a node's reconnect-delay. But it tells the socket's path as
// it was given, so the path is written in two more ways that mean the same file:
// DIR/.//NAME for the temporary node, DIR/./NAME for a treated storage node. The
// state of a disk can so be read from QEMU alone: treating it twice is harmless, and a
// treatment that broke off anywhere is taken up where it was.

// openTimeout is how long, in seconds, QEMU tries to connect when a node is added. It
// stands still meanwhile: the server must be up before.
const openTimeout = 5

// minDelay and maxDelay bound the reconnect delay. QEMU counts it in whole seconds.
const (
	minDelay = time.Second
	maxDelay = 10 * 365 * 24 * time.Hour
)

// nbdNode are the arguments of blockdev-add for driver nbd
// (BlockdevOptionsNbd of qapi/block-core.json).
type nbdNode struct {
	Driver         string    `json:"driver"`
	NodeName       string    `json:"node-name"`
	Server         nbdServer `json:"server"`
	Export         string    `json:"export"`
	ReconnectDelay uint32    `json:"reconnect-delay"` // seconds
	OpenTimeout    uint32    `json:"open-timeout"`    // seconds
	Cache          nodeCache `json:"cache"`
	AutoReadOnly   bool      `json:"auto-read-only"`
	Discard        string    `json:"discard"`
}

type nbdServer struct {
	Type string `json:"type"`
	Path string `json:"path"`
}

// rawNode is one of the options of blockdev-reopen, or a node to add. What is left out would be
// set to QEMU's default, so all that libvirt sets is here.
type rawNode struct {
	Driver       string    `json:"driver"`
	NodeName     string    `json:"node-name"`
	ReadOnly     bool      `json:"read-only"`
	DetectZeroes string    `json:"detect-zeroes,omitempty"`
	Discard      string    `json:"discard"`
	Cache        nodeCache `json:"cache"`
	File         string    `json:"file"`
}

// treatment is one disk's.
type treatment struct {
	mon     gq.Monitor
	socket  string // clean absolute path
	export  string
	delay   time.Duration
	discard string // "unmap" or "ignore"
	alias   string
	top     string // the name of the node the device is on: format.Name, but in the middle of heal
	format  node   // libvirt's format node
	storage string // the name of libvirt's storage node
	temp    string
}

// tempPrefix begins the names of temporary nodes.
const tempPrefix = "kagami-"

// socketName is the path that marks a temporary, a treated or a stock node.
func tempPath(socket string) string    { return path.Dir(socket) + "/.//" + path.Base(socket) }
func treatedPath(socket string) string { return path.Dir(socket) + "/./" + path.Base(socket) }

// nodeSocket cuts the socket's path out of what QEMU calls an NBD node's file:
// nbd+unix:///EXPORT?socket=PATH.
func nodeSocket(file string) string {
	_, p, _ := strings.Cut(file, "?socket=")
	return p
}

// newTreatment finds the disk's nodes.
func newTreatment(m gq.Monitor, alias, socket, export, discard string, delay time.Duration) (*treatment, error) {
	if delay < minDelay || delay > maxDelay {
		return nil, fmt.Errorf("reconnect delay %v: allowed are %v to %v", delay, minDelay, maxDelay)
	}
	if !path.IsAbs(socket) || path.Clean(socket) != socket {
		return nil, fmt.Errorf("socket %q: want a clean absolute path", socket)
	}
	top, err := findNode(m, alias)
	if err != nil {
		return nil, err
	}
	base, err := baseName(top)
	if err != nil {
		return nil, err
	}
	t := &treatment{
		mon: m, socket: socket, export: export, delay: delay, discard: discard, alias: alias,
		top: top.Name, format: top, storage: base + "-storage", temp: tempPrefix + base,
	}
	t.format.Name = base + "-format"
	return t, nil
}

// run does what is left of the six steps, or with broken, for a VM that is
// paused on an I/O error, heals the disk if the steps fail.
func (t *treatment) run(broken bool) error {
	if err := t.cancelJob(); err != nil { // left by a healing that broke off
		return err
	}
	if t.top != t.format.Name {
		return t.heal()
	}
	err := t.steps()
	if err != nil && broken && !errors.Is(err, ErrNotAttached) {
		return t.heal()
	}
	return err
}

func (t *treatment) steps() error {
	switch nodeSocket(t.format.File) {
	case treatedPath(t.socket):
		return t.dropTemp()
	case tempPath(t.socket):
	case t.socket:
		if err := t.toTemp(); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%w: QEMU uses %s, not the socket %s", ErrNotAttached, t.format.File, t.socket)
	}
	if err := t.toStorage(); err != nil {
		return err
	}
	return t.dropTemp()
}

// toTemp is steps 1 and 2. A temporary node that is left over is not in use here.
func (t *treatment) toTemp() error {
	if err := t.dropTemp(); err != nil {
		return err
	}
	if err := t.add(t.temp, tempPath(t.socket)); err != nil {
		return err
	}
	if err := t.reopen(t.temp); err != nil {
		return joinCleanup(err, t.dropTemp())
	}
	return nil
}

// toStorage is steps 3 to 5. The format node is on the temporary node.
func (t *treatment) toStorage() error {
	nodes, err := namedNodes(t.mon)
	if err != nil {
		return err
	}
	old, there := nodes[t.storage]
	if there && nodeSocket(old.File) != treatedPath(t.socket) {
		if err := t.del(t.storage); err != nil {
			return err
		}
		there = false
	}
	if !there {
		if err := t.add(t.storage, treatedPath(t.socket)); err != nil {
			return err
		}
	}
	return t.reopen(t.storage)
}

// dropTemp is step 6.
func (t *treatment) dropTemp() error { return t.drop(t.rawUpper(), t.temp) }

func (t *treatment) add(name, socket string) error {
	return execute(t.mon, "blockdev-add", nbdNode{
		Driver: "nbd", NodeName: name, Server: nbdServer{Type: "unix", Path: socket}, Export: t.export,
		ReconnectDelay: uint32(t.delay / time.Second), OpenTimeout: openTimeout,
		Cache: t.format.Cache, AutoReadOnly: true, Discard: t.discard,
	}, nil)
}

func (t *treatment) reopen(file string) error {
	type options struct {
		Options []rawNode `json:"options"`
	}
	return execute(t.mon, "blockdev-reopen", options{[]rawNode{t.rawNode(t.format.Name, file)}}, nil)
}

func (t *treatment) rawNode(name, file string) rawNode {
	return rawNode{
		Driver: "raw", NodeName: name, ReadOnly: t.format.ReadOnly, DetectZeroes: t.format.DetectZeroes,
		Discard: t.discard, Cache: t.format.Cache, File: file,
	}
}

func (t *treatment) del(name string) error {
	if err := raw.NewMonitor(t.mon).BlockdevDel(name); err != nil {
		return fmt.Errorf("blockdev-del %s: %w", name, err)
	}
	return nil
}
