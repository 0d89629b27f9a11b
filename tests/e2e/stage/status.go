package stage

import (
	"context"
	"encoding/json"
	"fmt"
	"os/user"
	"strconv"
	"time"

	"kagami/appliance/control"
	"kagami/tests/lab"
)

// Status asks the site's daemon.
func (s *Site) Status(ctx context.Context) (control.Status, error) {
	var st control.Status
	out, err := s.Command(ctx, "status", "--json").Output()
	if err != nil {
		return st, fmt.Errorf("status of site %s: %w", s.Name, err)
	}
	return st, json.Unmarshal(out, &st)
}

// Group returns the status of one group, or an error when the site has none of that name.
func (s *Site) Group(ctx context.Context, name string) (control.Group, error) {
	st, err := s.Status(ctx)
	if err != nil {
		return control.Group{}, err
	}
	for _, g := range st.Groups {
		if g.Name == name {
			return g, nil
		}
	}
	return control.Group{}, fmt.Errorf("site %s has no group %s", s.Name, name)
}

// AwaitGroup polls until cond holds for a group.
func (s *Site) AwaitGroup(ctx context.Context, name, what string, cond func(control.Group) bool) (control.Group, error) {
	var last control.Group
	for {
		g, err := s.Group(ctx, name)
		if err == nil && cond(g) {
			return g, nil
		}
		if err == nil {
			last = g
		}
		select {
		case <-ctx.Done():
			return last, fmt.Errorf("waited for %s of group %s at site %s; last seen: %+v (%v)", what, name, s.Name, last, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// QEMUGroup is the name of the group that libvirt runs QEMU as.
func QEMUGroup() string {
	_, gid, err := lab.QEMUUser()
	if err != nil {
		return ""
	}
	g, err := user.LookupGroupId(strconv.Itoa(gid))
	if err != nil {
		return ""
	}
	return g.Name
}
