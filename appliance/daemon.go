package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"kagami/appliance/config"
	"kagami/appliance/host"
)

const daemonLong = `Run the daemon of this site in the foreground: it serves protected disks, ships
their journals to peers, keeps the replicas of peers' groups, and answers this
command line. It logs to standard error and tells systemd when it is ready.

SIGTERM and SIGINT end it cleanly: what it has acknowledged is at the other
site, guests stall until it runs again, and the next start has nothing to
compare. SIGKILL and a loss of power lose nothing acknowledged either; the next
start compares the regions that were being written.`

func (a *app) daemonCmd() *cobra.Command {
	return &cobra.Command{
		Use: "daemon", Short: "Run the daemon of this site", Long: daemonLong,
		Example: "  kagami daemon --config /etc/kagami/kagami.yaml",
		Args:    cobra.NoArgs, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: action(func(cmd *cobra.Command, _ []string) error {
			cfg, err := a.load()
			if err != nil {
				return err
			}
			if a.socket != "" {
				cfg.Control.Socket = a.socket
			}
			return host.Run(cmd.Context(), cfg, release(), a.logger(cfg.Log))
		}),
	}
}

// logger writes to standard error; under "auto" as text for people on a
// terminal, else as JSON for whatever collects it.
func (a *app) logger(c config.Log) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo // config.Load has refused everything else
	}
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" || c.Format == "auto" && !a.tty {
		return slog.New(slog.NewJSONHandler(os.Stderr, o))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, o))
}
