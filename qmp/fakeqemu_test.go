package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	gq "github.com/digitalocean/go-qemu/qmp"
)

// fakeQEMU is a monitor with a graph of block nodes under one device, strict
// about what QEMU is strict about: names, nodes in use, flushing a dead node.
type fakeQEMU struct {
	nodes map[string]*fakeNode
	top   string // the node the device is on
	job   *fakeJob

	commands []string
	failAt   int  // fail at this command, counted from 1; 0: never
	lose     bool // the failing command is done, only its answer is lost
}

type fakeNode struct {
	driver, file string // file: the node below
	socket       string
	delay        uint32
	dead         bool
	discard      string
	cache        nodeCache
}

type fakeJob struct {
	id, from, to string
	ready        bool
}

var errLost = errors.New("the answer was lost")

// stockQEMU is a VM that was just started by libvirt.
func stockQEMU(socket string) *fakeQEMU {
	return &fakeQEMU{top: "libvirt-2-format", nodes: map[string]*fakeNode{
		"libvirt-2-storage": {driver: "nbd", socket: socket, cache: nodeCache{Direct: true}},
		"libvirt-2-format":  {driver: "raw", file: "libvirt-2-storage", cache: nodeCache{Direct: true}},
		"libvirt-1-storage": {driver: "file"},
		"libvirt-1-format":  {driver: "raw", file: "libvirt-1-storage"},
	}}
}

func (q *fakeQEMU) Connect() error    { return nil }
func (q *fakeQEMU) Disconnect() error { return nil }
func (q *fakeQEMU) Events(context.Context) (<-chan gq.Event, error) {
	return nil, gq.ErrEventsNotSupported
}

func (q *fakeQEMU) Run(b []byte) ([]byte, error) {
	var c struct {
		Execute   string          `json:"execute"`
		Arguments json.RawMessage `json:"arguments"`
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, err
	}
	q.commands = append(q.commands, c.Execute)
	fail := len(q.commands) == q.failAt
	if fail && !q.lose {
		return nil, errLost
	}
	ret, err := q.do(c.Execute, c.Arguments)
	if fail {
		return nil, errLost
	}
	if err != nil {
		return nil, &QMPError{Class: "GenericError", Desc: err.Error()}
	}
	return json.Marshal(map[string]any{"return": ret})
}

func (q *fakeQEMU) do(name string, args json.RawMessage) (any, error) {
	switch name {
	case "query-block":
		return []any{
			map[string]any{"device": "", "qdev": "/machine/peripheral/virtio-disk0/virtio-backend", "inserted": q.info("libvirt-1-format")},
			map[string]any{"device": "", "qdev": "/machine/peripheral/virtio-disk1/virtio-backend", "inserted": q.info(q.top)},
		}, nil
	case "query-named-block-nodes":
		var all []any
		for n := range q.nodes {
			all = append(all, q.info(n))
		}
		return all, nil
	case "blockdev-add":
		return map[string]any{}, q.add(args)
	case "blockdev-del":
		return map[string]any{}, q.del(args)
	case "blockdev-reopen":
		return map[string]any{}, q.reopen(args)
	case "blockdev-mirror":
		return map[string]any{}, q.mirror(args)
	case "query-block-jobs":
		jobs := []any{}
		if q.job != nil {
			jobs = append(jobs, map[string]any{"device": q.job.id, "ready": q.job.ready})
			q.job.ready = true
		}
		return jobs, nil
	case "job-complete":
		if q.job == nil || !q.job.ready {
			return nil, errors.New("job not ready")
		}
		q.top, q.job = q.job.to, nil
		return map[string]any{}, nil
	case "block-job-cancel":
		if q.job == nil {
			return nil, errors.New("no such job")
		}
		q.job = nil
		return map[string]any{}, nil
	}
	return nil, fmt.Errorf("no command %s", name)
}

// lower is the NBD node a node ends at.
func (q *fakeQEMU) lower(name string) *fakeNode {
	n := q.nodes[name]
	for n != nil && n.driver == "raw" {
		n = q.nodes[n.file]
	}
	return n
}

func (q *fakeQEMU) info(name string) map[string]any {
	n, file := q.nodes[name], "/x"
	if l := q.lower(name); l != nil && l.driver == "nbd" {
		file = "nbd+unix:///e?socket=" + l.socket
	}
	return map[string]any{"node-name": name, "drv": n.driver, "file": file, "ro": false, "detect_zeroes": "off", "cache": n.cache}
}

func (q *fakeQEMU) add(args json.RawMessage) error {
	var a struct {
		Driver   string    `json:"driver"`
		NodeName string    `json:"node-name"`
		Server   nbdServer `json:"server"`
		Export   string    `json:"export"`
		Delay    uint32    `json:"reconnect-delay"`
		File     string    `json:"file"`
		Discard  string    `json:"discard"`
		Cache    nodeCache `json:"cache"`
	}
	if err := json.Unmarshal(args, &a); err != nil {
		return err
	}
	switch {
	case q.nodes[a.NodeName] != nil || len(a.NodeName) > 31:
		return fmt.Errorf("node name %s is taken or too long", a.NodeName)
	case a.Driver == "raw" && (q.nodes[a.File] == nil || q.inUse(a.File)):
		return fmt.Errorf("node %s cannot be used", a.File)
	case a.Driver == "nbd" && (a.Export != "e" || a.Delay == 0):
		return errors.New("wrong export, or no delay")
	}
	q.nodes[a.NodeName] = &fakeNode{driver: a.Driver, file: a.File, socket: a.Server.Path, delay: a.Delay, discard: a.Discard, cache: a.Cache}
	return nil
}

func (q *fakeQEMU) inUse(name string) bool {
	if q.top == name || q.job != nil && (q.job.from == name || q.job.to == name) {
		return true
	}
	for _, n := range q.nodes {
		if n.file == name {
			return true
		}
	}
	return false
}

func (q *fakeQEMU) del(args json.RawMessage) error {
	var a struct {
		NodeName string `json:"node-name"`
	}
	if err := json.Unmarshal(args, &a); err != nil {
		return err
	}
	if q.nodes[a.NodeName] == nil || q.inUse(a.NodeName) {
		return fmt.Errorf("node %s is not there or in use", a.NodeName)
	}
	delete(q.nodes, a.NodeName)
	return nil
}

func (q *fakeQEMU) reopen(args json.RawMessage) error {
	var a struct {
		Options []rawNode `json:"options"`
	}
	if err := json.Unmarshal(args, &a); err != nil || len(a.Options) != 1 {
		return fmt.Errorf("options: %w", err)
	}
	o := a.Options[0]
	n := q.nodes[o.NodeName]
	switch {
	case n == nil || q.nodes[o.File] == nil:
		return errors.New("no such node")
	case q.lower(o.NodeName).dead:
		return errors.New("Error flushing drive: Input/output error")
	case n.file != o.File && q.inUse(o.File):
		return fmt.Errorf("node %s is in use", o.File)
	case o.Driver != n.driver || o.Cache != n.cache || o.ReadOnly || o.DetectZeroes != "off":
		return fmt.Errorf("options would change: %+v", o)
	}
	n.file, n.discard = o.File, o.Discard
	return nil
}

func (q *fakeQEMU) mirror(args json.RawMessage) error {
	var a struct {
		Device, Target, Sync string
		ID                   string `json:"job-id"`
	}
	if err := json.Unmarshal(args, &a); err != nil {
		return err
	}
	if q.job != nil || q.nodes[a.Device] == nil || q.nodes[a.Target] == nil || q.inUse(a.Target) || a.Sync != "none" {
		return errors.New("mirror refused")
	}
	q.job = &fakeJob{id: a.ID, from: a.Device, to: a.Target}
	return nil
}

// treatedWell checks the end state: the device on libvirt's own two nodes, the
// lower with a delay, and nothing left over.
func (q *fakeQEMU) treatedWell() error {
	s := q.nodes["libvirt-2-storage"]
	f := q.nodes["libvirt-2-format"]
	switch {
	case q.top != "libvirt-2-format" || f == nil || f.file != "libvirt-2-storage" || s == nil:
		return fmt.Errorf("the disk is on %s, %+v, %+v", q.top, f, s)
	case s.delay != 3600 || s.dead || s.discard != "unmap" || f.discard != "unmap" || !s.cache.Direct || !f.cache.Direct:
		return fmt.Errorf("the nodes are %+v, %+v", f, s)
	case q.job != nil:
		return errors.New("a job is left")
	}
	for n := range q.nodes {
		if strings.HasPrefix(n, tempPrefix) {
			return fmt.Errorf("node %s is left", n)
		}
	}
	return nil
}
