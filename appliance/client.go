package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"kagami/appliance/config"
	"kagami/appliance/control"
)

const defaultConfig = config.DefaultPath

// getenv reads the app's environment; "" when a variable is not set.
func (a *app) getenv(name string) string {
	for _, e := range a.environ {
		if k, v, _ := strings.Cut(e, "="); k == name {
			return v
		}
	}
	return ""
}

// configPath is the file in use: flag, environment, default.
func (a *app) configPath() string {
	if a.config != "" {
		return a.config
	}
	if p := a.getenv(config.EnvConfig); p != "" {
		return p
	}
	return defaultConfig
}

// load reads the configuration file. A variable that looks like an override and
// is none is refused, as an unknown key is: it is probably misspelt.
func (a *app) load() (*config.Config, error) {
	if names := config.UnknownEnv(a.environ); len(names) > 0 {
		return nil, &control.Error{Code: "config", Message: "configuration: the environment sets what overrides nothing: " + strings.Join(names, ", "),
			Hint: "unset it, or spell it as kagami help environment does", Exit: control.ExitUsage}
	}
	c, err := config.Load(a.configPath())
	if err == nil {
		return c, nil
	}
	e := &control.Error{Code: "config", Message: err.Error(), Exit: control.ExitUsage}
	e.Hint = "put that right in the file; kagami config init - shows every key with what is allowed"
	if errors.Is(err, fs.ErrNotExist) {
		e.Hint = "kagami config init writes an example to fill in"
	}
	return nil, e
}

// socketPath finds the daemon's socket: flag, environment, configuration file,
// default. A configuration that is missing, unreadable for this user or
// broken does not keep anyone from a running daemon, unless it was named.
func (a *app) socketPath() (string, error) {
	if a.socket != "" {
		return a.socket, nil
	}
	if s := a.getenv(config.EnvName("control.socket")); s != "" {
		return s, nil
	}
	c, err := config.Load(a.configPath())
	if err == nil {
		return c.Control.Socket, nil
	}
	if a.config != "" {
		_, err = a.load()
		return "", err
	}
	def := filepath.Join(config.DefaultRunDir, config.ControlSocketName)
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		_, _ = fmt.Fprintf(a.err, "kagami: warning: %s is not usable (kagami config check says why); trying %s\n", a.configPath(), def)
	}
	return def, nil
}

func (a *app) client() (*control.Client, error) {
	s, err := a.socketPath()
	if err != nil {
		return nil, err
	}
	return control.NewClient(s), nil
}

// printJSON writes one value, indented.
func (a *app) printJSON(v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("write JSON: %w", err)
	}
	a.printf("%s\n", data)
	return nil
}

// vmNames completes the names of groups from the daemon's status; without a
// daemon there is nothing to complete.
func (a *app) vmNames(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.fromStatus(cmd.Context(), func(st control.Status) (out []string) {
		for _, g := range st.Groups {
			out = append(out, g.Name+"\t"+g.Role+", "+g.State)
		}
		return out
	}), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) peerNames(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.fromStatus(cmd.Context(), func(st control.Status) (out []string) {
		for _, p := range st.Peers {
			out = append(out, p.Name+"\t"+p.Address)
		}
		return out
	}), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) fromStatus(ctx context.Context, pick func(control.Status) []string) []string {
	if ctx == nil {
		ctx = context.Background()
	}
	c, err := a.client()
	if err != nil {
		return nil
	}
	st, err := c.Status(ctx)
	if err != nil {
		return nil
	}
	return pick(st)
}
