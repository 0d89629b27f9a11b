package replica

import (
	"strings"
	"testing"

	"kagami/ext4j/epoch"
)

// TestStateOfAnotherIsRefused: what a later release, another group or another
// replica of the group wrote is refused in words, and left as it is.
func TestStateOfAnotherIsRefused(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(s *site, o *Options)
		words  string
	}{
		{"damage of a later release", func(s *site, _ *Options) { s.fs.WriteFile(siteDir+"/damaged", []byte(`{"version":2,"why":"x"}`)) }, "has version 2, this release reads 1"},
		{"damage without a version", func(s *site, _ *Options) { s.fs.WriteFile(siteDir+"/damaged", []byte(`{"why":"x"}`)) }, "has version 0"},
		{"another replica's marks", func(_ *site, o *Options) { o.Replica = epoch.UUID{4} }, "it belongs to replica"},
		{"another group's marks", func(_ *site, o *Options) { o.ID = epoch.UUID{9} }, "it belongs to replica"},
	} {
		s := newSite(t, 1)
		s.mustOpen()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 0, pattern(512, 7))
		m.close()
		s.receive(m.take())
		s.shut()
		o := s.g.o
		c.change(s, &o)
		if g, err := Open(o); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %q", c.name, err, c.words)
			if err == nil {
				_ = g.Close()
			}
		}
	}
}

// TestDamageIsVersioned pins the file.
func TestDamageIsVersioned(t *testing.T) {
	s := newSite(t, 1)
	s.mustOpen()
	defer s.shut()
	if err := s.g.storeDamage(damage{Why: "somebody wrote to it", Torn: true}); err != nil {
		t.Fatal(err)
	}
	b, err := s.fs.ReadFile(siteDir + "/damaged")
	if want := `{"version":1,"why":"somebody wrote to it","torn":true}`; err != nil || string(b) != want {
		t.Errorf("%s, %v, want %s", b, err, want)
	}
}
