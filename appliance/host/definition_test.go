package host

import (
	"os"
	"strings"
	"testing"

	"kagami/appliance/control"
	"kagami/qmp"
)

// setDevices changes the VM's stored definition, as virsh edit does.
func (s *site) setDevices(vm *fakeVM, devices string) {
	vm.setDevices(devices)
	s.host.send(qmp.Event{Kind: qmp.EventDefined, VM: vm.name, Reason: "updated"})
}

// setDevices is a change of which libvirt tells nobody.
func (vm *fakeVM) setDevices(devices string) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.devices = devices
}

func (h *fakeHost) setNetwork(name string, st qmp.NetworkState) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.networks == nil {
		h.networks = map[string]qmp.NetworkState{}
	}
	h.networks[name] = st
}

const prodCard = "<interface type='network'><source network='prod'/><model type='virtio'/></interface>"

// TestInactiveNetwork: a network of the replica's site that is defined and not
// active is found by protect, and before a promotion.
func TestInactiveNetwork(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	vm.devices = prodCard
	p.dr.host.setNetwork("prod", qmp.NetworkInactive)
	here, there := p.main.traces(), p.dr.traces()
	refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitRefused,
		"prod is defined at this site but not active", "virsh net-start prod", "virsh net-autostart prod")
	p.main.untouched(here)
	p.dr.untouched(there)
	p.dr.host.setNetwork("prod", qmp.NetworkReady)
	p.main.mustProtect(testVM)
	p.dr.host.setNetwork("prod", qmp.NetworkInactive)
	p.main.stop()
	p.dr.awaitState(testVM, "waiting")
	_, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitRefused, "not active", "virsh net-start prod")
	if g := p.dr.group(testVM); g.Role != "replica" {
		t.Errorf("it was promoted all the same: %+v", g)
	}
}

// TestNameTaken: the replica's site has a VM of the name or UUID. Protect says
// so, and a failover before it promotes.
func TestNameTaken(t *testing.T) {
	const other = "6b1d2c9e-0000-4000-8000-0000000000ff"
	for _, c := range []struct {
		name, vm, uuid string
		runs           bool
		words          []string
	}{
		{"name", testVM, other, false, []string{"another VM named vm1", "domain: name:"}},
		{"UUID", "other", testUUID, false, []string{"VM other has the UUID " + testUUID, "uuid: derive"}},
		{"running", testVM, testUUID, true, []string{"a VM named vm1 runs already, and not from the replica's disks"}},
		{"defined", testVM, testUUID, false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t).up()
			p.main.addVM(testVM, "vda")
			obstacle := func() {
				vm := p.dr.addVM(c.vm, "vdz")
				vm.uuid = c.uuid
				if !c.runs {
					vm.destroy()
				}
			}
			remove := func() {
				p.dr.host.mu.Lock()
				delete(p.dr.host.vms, c.vm)
				p.dr.host.mu.Unlock()
			}
			obstacle()
			req := control.ProtectRequest{VM: testVM, To: "dr", DryRun: true}
			err := p.main.protect(t.Context(), req)
			if c.words == nil {
				must(t, err)
				if !strings.Contains(p.main.log.String(), "a failover replaces its definition") {
					t.Error("no warning of the definition that a failover would replace")
				}
				return
			}
			refusedAs(t, err, control.ExitRefused, c.words...)
			remove()
			p.main.mustProtect(testVM)
			obstacle()
			p.main.stop()
			p.dr.awaitState(testVM, "waiting")
			_, err = p.dr.failover(control.FailoverRequest{VM: testVM})
			refusedAs(t, err, control.ExitRefused, append(c.words, "--no-start")...)
			if g := p.dr.group(testVM); g.Role != "replica" {
				t.Fatalf("it was promoted all the same: %+v", g)
			}
			remove()
			_, err = p.dr.failover(control.FailoverRequest{VM: testVM})
			must(t, err)
		})
	}
}

// TestEmulationAuto: where libvirt offers no KVM, a replica of a VM that ran
// under it is emulated, and protect says so.
func TestEmulationAuto(t *testing.T) {
	for _, kvm := range []bool{true, false} {
		p := newPair(t)
		p.dr.emulation = "auto"
		p.dr.host.noKVM = !kvm
		p.up()
		p.main.addVM(testVM, "vda").kind = "kvm"
		p.main.mustProtect(testVM)
		if warned := strings.Contains(p.main.log.String(), "under software emulation"); warned == kvm {
			t.Errorf("KVM %v: a warning %v", kvm, warned)
		}
		p.main.stop()
		p.dr.awaitState(testVM, "waiting")
		_, err := p.dr.failover(control.FailoverRequest{VM: testVM})
		must(t, err)
		if vm := p.dr.host.vm(testVM); (vm.kind == "kvm") != kvm {
			t.Errorf("KVM %v: the replica's type is %q", kvm, vm.kind)
		}
	}
}

// TestDefinitionShippedAgain: a change of the VM's definition reaches the
// replica, at once or at the next attach, and raises an alarm while it cannot
// run there.
func TestDefinitionShippedAgain(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	shipped := func(part string) func() bool {
		return func() bool {
			b, err := os.ReadFile(p.dr.path("state", "groups", testVM, "domain.xml"))
			return err == nil && strings.Contains(string(b), part)
		}
	}
	await(t, "the definition with the export to be shipped", shipped("vm1-vda.sock"))
	p.main.setDevices(vm, prodCard)
	await(t, "the network card to be shipped", shipped("network='prod'"))
	if g := p.main.group(testVM); len(g.Alarms) > 0 {
		t.Errorf("alarms: %q", g.Alarms)
	}
	p.dr.host.setNetwork("lab", qmp.NetworkMissing)
	p.main.setDevices(vm, strings.ReplaceAll(prodCard, "prod", "lab"))
	await(t, "the alarm", func() bool {
		g := p.main.group(testVM)
		return len(g.Alarms) == 1 && strings.Contains(g.Alarms[0], "site dr could not run vm1 as it is defined now") && strings.Contains(g.Alarms[0], "lab is not at this site")
	})
	await(t, "it to be shipped all the same", shipped("network='lab'"))
	// The replica's site puts it right; the next attach sees that, and what was
	// changed while it was away.
	p.dr.stop()
	p.main.awaitState(testVM, "stalled")
	p.dr.host.setNetwork("lab", qmp.NetworkReady)
	p.main.setDevices(vm, strings.ReplaceAll(prodCard, "prod", "lab")+prodCard)
	p.start(p.dr, p.main)
	p.main.awaitState(testVM, "streaming")
	await(t, "the alarm to be over", func() bool { return len(p.main.group(testVM).Alarms) == 0 })
	await(t, "what was changed meanwhile", shipped("network='prod'"))
}

// TestDefinitionChangedWithoutEvent: libvirt tells nobody of a change made with
// --config, nor of a network that is started at the replica's site.
func TestDefinitionChangedWithoutEvent(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	vm.setDevices(strings.ReplaceAll(prodCard, "prod", "lab"))
	p.dr.host.setNetwork("lab", qmp.NetworkInactive)
	await(t, "the alarm", func() bool {
		g := p.main.group(testVM)
		return len(g.Alarms) == 1 && strings.Contains(g.Alarms[0], "lab is defined at this site but not active")
	})
	await(t, "it to be shipped", func() bool { // the alarm may come first
		b, err := os.ReadFile(p.dr.path("state", "groups", testVM, "domain.xml"))
		return err == nil && strings.Contains(string(b), "network='lab'")
	})
	p.dr.host.setNetwork("lab", qmp.NetworkReady)
	await(t, "the alarm to be over", func() bool { return len(p.main.group(testVM).Alarms) == 0 })
}

// TestDefinitionOfAnOlderReplica: a replica whose state is an older one, or was
// made anew, gets the definition at its next attach, although it was shipped before.
func TestDefinitionOfAnOlderReplica(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	kept, there := p.main.path("state", "groups", testVM, "domain.xml"), p.dr.path("state", "groups", testVM, "domain.xml")
	for _, older := range []string{"<domain/>", ""} {
		p.dr.stop()
		p.main.awaitState(testVM, "stalled")
		must(t, os.Remove(there))
		if older != "" {
			must(t, os.WriteFile(there, []byte(older), 0o600))
		}
		p.start(p.dr, p.main)
		await(t, "the definition to be shipped again", func() bool {
			b, err := os.ReadFile(there)
			return err == nil && string(b) == string(readFile(t, kept))
		})
	}
}
