package qmp

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// Healing. A VM that was started without the treatment, and whose server went
// away before it got it, is paused on an I/O error with an NBD node that is
// dead for good: every flush fails, and with it blockdev-reopen. But a mirror that copies
// nothing (sync=none) can put another node in a node's place. Nothing is written
// meanwhile, the VM being paused; its failed requests are made again when it is resumed.
//
//	1 blockdev-add     temporary nbd node, temporary raw node over it
//	2 blockdev-mirror  format node → temporary raw node, job-complete
//	3 blockdev-del     libvirt's format and storage nodes
//	4 blockdev-add     storage node with reconnect-delay, format node over it
//	5 blockdev-mirror  temporary raw node → format node, job-complete
//	6 blockdev-del     the temporary nodes
//
// As with the treatment, the state is read from QEMU: the device is on
// libvirt's format node before step 2 and after step 5, on the temporary one between.

// healJobTime is how long a mirror of nothing may take.
const healJobTime = 30 * time.Second

// healJob is the id of a disk's mirror.
func (t *treatment) healJob() string { return t.temp + "-heal" }

// rawUpper is the temporary raw node of a healing.
func (t *treatment) rawUpper() string { return t.temp + "-raw" }

// heal puts the device on treated nodes of libvirt's names.
func (t *treatment) heal() error {
	if t.top == t.format.Name {
		err := t.drop(t.rawUpper(), t.temp)
		if err == nil {
			err = t.add(t.temp, tempPath(t.socket))
		}
		if err == nil {
			err = t.addRaw(t.rawUpper(), t.temp)
		}
		if err == nil {
			err = t.move(t.format.Name, t.rawUpper())
		}
		if err != nil {
			return joinCleanup(err, t.drop(t.rawUpper(), t.temp))
		}
	}
	if err := t.drop(t.format.Name, t.storage); err != nil {
		return err
	}
	if err := t.add(t.storage, treatedPath(t.socket)); err != nil {
		return err
	}
	if err := t.addRaw(t.format.Name, t.storage); err != nil {
		return err
	}
	if err := t.move(t.rawUpper(), t.format.Name); err != nil {
		return err
	}
	return t.drop(t.rawUpper(), t.temp)
}

// drop deletes those of the nodes that are there, in order.
func (t *treatment) drop(names ...string) error {
	nodes, err := namedNodes(t.mon)
	if err != nil {
		return err
	}
	for _, n := range names {
		if _, there := nodes[n]; !there {
			continue
		}
		if err := t.del(n); err != nil {
			return err
		}
	}
	return nil
}

func (t *treatment) addRaw(name, file string) error {
	return execute(t.mon, "blockdev-add", t.rawNode(name, file), nil)
}

// jobInfo is BlockJobInfo of qapi/block-core.json, as far as it is used.
type jobInfo struct {
	Device string `json:"device"` // the job's id
	Ready  bool   `json:"ready"`
}

// move puts the node to in the place of from, for all that use it.
func (t *treatment) move(from, to string) error {
	args := map[string]string{"job-id": t.healJob(), "device": from, "target": to, "sync": "none"}
	err := execute(t.mon, "blockdev-mirror", args, nil)
	if err == nil {
		err = t.waitJob(func(j *jobInfo) bool { return j == nil || j.Ready })
	}
	if err == nil {
		err = execute(t.mon, "job-complete", map[string]string{"id": t.healJob()}, nil)
	}
	if err == nil {
		err = t.waitJob(func(j *jobInfo) bool { return j == nil })
	}
	if err != nil {
		return joinCleanup(err, t.cancelJob())
	}
	top, err := findNode(t.mon, t.alias)
	if err != nil {
		return err
	}
	if top.Name != to {
		return fmt.Errorf("blockdev-mirror: the disk is on node %s, not %s", top.Name, to)
	}
	return nil
}

// cancelJob ends a job of move's that may be there; the disk stays where it is.
func (t *treatment) cancelJob() error {
	job, err := t.job()
	if err != nil || job == nil {
		return err
	}
	err = execute(t.mon, "block-job-cancel", map[string]any{"device": t.healJob(), "force": true}, nil)
	return errors.Join(err, t.waitJob(func(j *jobInfo) bool { return j == nil }))
}

// job is move's job; nil: it is not there.
func (t *treatment) job() (*jobInfo, error) {
	var jobs []jobInfo
	if err := execute(t.mon, "query-block-jobs", nil, &jobs); err != nil {
		return nil, err
	}
	for i := range jobs {
		if jobs[i].Device == t.healJob() {
			return &jobs[i], nil
		}
	}
	return nil, nil
}

// waitJob polls until the job is as wanted; nil means that it is gone.
func (t *treatment) waitJob(wanted func(*jobInfo) bool) error {
	for end := time.Now().Add(healJobTime); ; time.Sleep(20 * time.Millisecond) {
		job, err := t.job()
		if err != nil || wanted(job) {
			return err
		}
		if time.Now().After(end) {
			return errors.New("blockdev-mirror: the job does not end")
		}
	}
}

// baseName is libvirt's name for a disk's nodes without their endings, from the
// name of the node the device is on.
func baseName(top node) (string, error) {
	name, ours := strings.CutPrefix(top.Name, tempPrefix)
	if ours {
		name = strings.TrimSuffix(name, "-raw") + "-format"
	}
	if !formatNode.MatchString(name) || top.Driver != "raw" {
		return "", fmt.Errorf("%w: its top node in QEMU is %q (%s), not libvirt's raw format node", ErrUnsuited, top.Name, top.Driver)
	}
	return strings.TrimSuffix(name, "-format"), nil
}
