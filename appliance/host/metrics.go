package host

import (
	"github.com/prometheus/client_golang/prometheus"

	"kagami/appliance/control"
)

// collector turns status into Prometheus metrics at each scrape.
type collector struct{ d *Daemon }

// metric is one number of a group.
type metric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(control.Group) float64
}

func groupDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("kagami_"+name, help, []string{"group", "role"}, nil)
}

var groupMetrics = []metric{
	{groupDesc("group_protected", "1 while every returned fsync survives the loss of the source's site."), prometheus.GaugeValue,
		func(g control.Group) float64 { return number(g.Protected) }},
	{groupDesc("group_peer_connected", "1 while the other site is attached."), prometheus.GaugeValue, func(g control.Group) float64 { return number(g.PeerUp) }},
	{groupDesc("group_alarms", "Alarms raised."), prometheus.GaugeValue, func(g control.Group) float64 { return float64(len(g.Alarms)) }},
	{groupDesc("group_rpo_seconds", "Age of what the replica lacks; 0 when it has everything."), prometheus.GaugeValue, func(g control.Group) float64 { return g.RPOSeconds }},
	{groupDesc("group_lsn_assigned", "Last LSN given at the source, or received at the replica."), prometheus.CounterValue, func(g control.Group) float64 { return float64(g.LSN.Assigned) }},
	{groupDesc("group_lsn_durable", "Last LSN durable at the replica."), prometheus.CounterValue, func(g control.Group) float64 { return float64(g.LSN.Durable) }},
	{groupDesc("group_lsn_applied", "Last LSN applied to the replica's images."), prometheus.CounterValue, func(g control.Group) float64 { return float64(g.LSN.Applied) }},
	{groupDesc("group_backlog_bytes", "Unacknowledged records on the source's disk: written while the replica was away."), prometheus.GaugeValue, func(g control.Group) float64 { return float64(g.BacklogBytes) }},
	{groupDesc("group_queue_bytes", "Unacknowledged records in the source's memory."), prometheus.GaugeValue, func(g control.Group) float64 { return float64(g.QueueBytes) }},
	{groupDesc("group_spool_bytes", "Spool in use at the replica."), prometheus.GaugeValue, func(g control.Group) float64 { return float64(g.SpoolBytes) }},
	{groupDesc("group_active_regions", "Regions of 1 MiB that may differ between the sites."), prometheus.GaugeValue, func(g control.Group) float64 { return float64(g.Regions) }},
	{groupDesc("group_unacked_flushes", "FLUSHes that wait for the replica."), prometheus.GaugeValue, func(g control.Group) float64 { return float64(g.Flushes) }},
	{groupDesc("group_flushes_total", "FLUSHes that clients asked for since the daemon started."), prometheus.CounterValue, func(g control.Group) float64 { return float64(g.AllFlushes) }},
	{groupDesc("group_local_flushes_total", "Of them, those that promised nothing the replica did not have."), prometheus.CounterValue, func(g control.Group) float64 { return float64(g.LocalFlushes) }},
	{groupDesc("group_written_bytes_total", "Bytes written by the guest since the daemon started."), prometheus.CounterValue, func(g control.Group) float64 { return float64(g.Written) }},
	{groupDesc("group_resynced_bytes_total", "Bytes shipped by first sync and resync since the daemon started."), prometheus.CounterValue, func(g control.Group) float64 { return float64(g.Resynced) }},
}

var (
	stateDesc = prometheus.NewDesc("kagami_group_state", "1 for the state a group is in.", []string{"group", "role", "state"}, nil)
	peerDesc  = prometheus.NewDesc("kagami_peer_connected", "1 while the link to a peer is up.", []string{"peer"}, nil)
	rttDesc   = prometheus.NewDesc("kagami_peer_rtt_seconds", "Round trip of the last heartbeat.", []string{"peer"}, nil)
	sentDesc  = prometheus.NewDesc("kagami_peer_sent_bytes", "Bytes put on data connections since the link came up.", []string{"peer"}, nil)
)

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Describe lists the metrics.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range groupMetrics {
		ch <- m.desc
	}
	ch <- stateDesc
	ch <- peerDesc
	ch <- rttDesc
	ch <- sentDesc
}

// Collect takes them from one status.
func (c collector) Collect(ch chan<- prometheus.Metric) {
	for _, g := range c.d.snapshot() {
		st := g.status()
		for _, m := range groupMetrics {
			ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(st), st.Name, st.Role)
		}
		ch <- prometheus.MustNewConstMetric(stateDesc, prometheus.GaugeValue, 1, st.Name, st.Role, st.State)
	}
	for _, p := range c.d.peerStatus() {
		ch <- prometheus.MustNewConstMetric(peerDesc, prometheus.GaugeValue, number(p.Connected), p.Name)
		ch <- prometheus.MustNewConstMetric(rttDesc, prometheus.GaugeValue, p.RTTMs/1e3, p.Name)
		ch <- prometheus.MustNewConstMetric(sentDesc, prometheus.GaugeValue, float64(p.SentBytes), p.Name)
	}
}
