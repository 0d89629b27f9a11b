package qmp

import (
	"fmt"
	"regexp"
	"strings"

	gq "github.com/digitalocean/go-qemu/qmp"
)

// node is what query-named-block-nodes and query-block say of a block node
// (BlockDeviceInfo of qapi/block-core.json), as far as it is used.
type node struct {
	Name         string    `json:"node-name"`
	Driver       string    `json:"drv"`
	File         string    `json:"file"`
	ReadOnly     bool      `json:"ro"`
	DetectZeroes string    `json:"detect_zeroes"`
	Cache        nodeCache `json:"cache"`
}

type nodeCache struct {
	Direct  bool `json:"direct"`
	NoFlush bool `json:"no-flush"`
}

// blockDevice is an entry of query-block (BlockInfo).
type blockDevice struct {
	QDev     string `json:"qdev"`
	Inserted *node  `json:"inserted"`
}

// formatNode is how libvirt names the upper of a disk's two nodes; the lower is named -storage.
var formatNode = regexp.MustCompile(`^libvirt-[0-9]+-format$`)

// findNode finds the top node of the device with a libvirt alias.
func findNode(m gq.Monitor, alias string) (node, error) {
	var devs []blockDevice
	if err := execute(m, "query-block", nil, &devs); err != nil {
		return node{}, err
	}
	for _, d := range devs {
		if d.Inserted != nil && isDevice(d.QDev, alias) {
			return *d.Inserted, nil
		}
	}
	return node{}, fmt.Errorf("%w: QEMU has no disk device %q", ErrNoDisk, alias)
}

// isDevice: query-block gives a device's id, or its path in QEMU's object tree, or,
// for virtio, that of its backend below it.
func isDevice(qdev, alias string) bool {
	rest, ok := strings.CutPrefix(qdev, "/machine/peripheral/")
	if !ok {
		return qdev == alias
	}
	id, _, _ := strings.Cut(rest, "/")
	return id == alias
}

func namedNodes(m gq.Monitor) (map[string]node, error) {
	var ns []node
	if err := execute(m, "query-named-block-nodes", map[string]bool{"flat": true}, &ns); err != nil {
		return nil, err
	}
	byName := make(map[string]node, len(ns))
	for _, n := range ns {
		byName[n.Name] = n
	}
	return byName, nil
}
