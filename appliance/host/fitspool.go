package host

import (
	"fmt"

	"kagami/appliance/config"
	"kagami/ext4j"
	"kagami/ext4j/epoch"
)

// resyncRoom is the part of the replica's spool, bytes, that a resync may
// fill, headers of records included. Its epoch has to fit as a whole; the rest is
// for what clients write meanwhile (clientsShare) and for ends of segments.
func resyncRoom(spool int64) int64 { return max(0, spool) / 4 * 3 }

// regionCost is the most that a region takes of the spool in a resync, bytes.
const regionCost = regionBytes + regionBytes/ext4j.Chunk*epoch.HeaderSize

// fitSpool bounds what the active log may name by the replica's spool: after a
// crash here, all of it may have to go through there at once, and until it has
// no client is served. active_log_bytes and spool_bytes are set at different
// sites, so nobody else can see that they do not go together. A smaller log
// costs fdatasyncs; a resync that does not fit costs the service.
func (s *source) fitSpool(spool int64) {
	room := resyncRoom(spool) / regionCost * regionBytes
	least := s.maxExtent()/regionBytes*regionBytes + 2*regionBytes // it may begin and end within regions
	s.log.Limit(int(max(room, least) / regionBytes))
	text := ""
	if room < min(least, s.limits.ActiveLogBytes) {
		text = fmt.Sprintf("site %s has a spool of %s: after a crash of this site a resync may not fit; raise spool_bytes there to %s or more",
			s.g.snapshot().Peer, config.FormatSize(spool), config.FormatSize(s.limits.ActiveLogBytes/3*4))
	} else if room < s.limits.ActiveLogBytes {
		s.g.note(fmt.Sprintf("the active log is bounded to %s instead of %s: a resync has to fit the spool of site %s, which has %s",
			config.FormatSize(room), config.FormatSize(s.limits.ActiveLogBytes), s.g.snapshot().Peer, config.FormatSize(spool)))
	}
	s.g.alarm("limits", text)
}

// maxExtent is the largest zero or trim that is one record, bytes: it must fit
// the active log several times.
func (s *source) maxExtent() int64 { return min(s.limits.ActiveLogBytes/4, epoch.MaxExtent) }
