package host

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kagami/appliance/control"
)

// controlServer serves the control API; the daemon is its backend.
func (d *Daemon) controlServer() *control.Server {
	return control.NewServer(d, control.ServerOptions{Version: d.release, Metrics: d.metrics(), Log: d.log})
}

func (d *Daemon) metrics() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collector{d}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
}
