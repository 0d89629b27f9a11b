package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

// askPatience bounds a short request.
const askPatience = 10 * time.Second

// maxAnswer bounds an answer, and a line of a stream, in bytes.
const maxAnswer = 16 << 20

// Client talks to the daemon behind a control socket. Its errors are *Error.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient makes a client; it connects with the first request.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}
	return &Client{socket: socket, http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Status asks for everything the site knows.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var st Status
	return st, c.get(ctx, "/v1/status", &st)
}

// Version asks for the daemon's release.
func (c *Client) Version(ctx context.Context) (Version, error) {
	var v Version
	return v, c.get(ctx, "/v1/version", &v)
}

// Protect starts protecting a VM and returns when that has ended. Ending ctx
// cancels it.
func (c *Client) Protect(ctx context.Context, req ProtectRequest, emit func(Event)) error {
	return c.run(ctx, "protect", req, emit, nil)
}

// Unprotect moves a VM back to plain files. Ending ctx cancels it.
func (c *Client) Unprotect(ctx context.Context, req UnprotectRequest, emit func(Event)) error {
	return c.run(ctx, "unprotect", req, emit, nil)
}

// Failover takes a VM over. Ending ctx ends only the waiting for it.
func (c *Client) Failover(ctx context.Context, req FailoverRequest, emit func(Event)) (FailoverReport, error) {
	var report FailoverReport
	return report, c.run(ctx, "failover", req, emit, &report)
}

// Forget gives up a group at this site. Ending ctx ends only the waiting for it.
func (c *Client) Forget(ctx context.Context, req ForgetRequest, emit func(Event)) error {
	return c.run(ctx, "forget", req, emit, nil)
}

// Verify compares a group with its replica; the end of ctx ends it.
func (c *Client) Verify(ctx context.Context, req VerifyRequest, emit func(Event)) (VerifyReport, error) {
	var report VerifyReport
	return report, c.run(ctx, "verify", req, emit, &report)
}

// Reprotect makes the other site of a failed-over group its replica. Ending ctx ends
// the waiting, what was begun goes on.
func (c *Client) Reprotect(ctx context.Context, req ReprotectRequest, emit func(Event)) error {
	return c.run(ctx, "reprotect", req, emit, nil)
}

// Switchover moves a group to its replica's site. Ending ctx ends only the waiting for it.
func (c *Client) Switchover(ctx context.Context, req SwitchoverRequest, emit func(Event)) (FailoverReport, error) {
	var report FailoverReport
	return report, c.run(ctx, "switchover", req, emit, &report)
}

// Failback brings a group back to the site it was failed over from. Ending ctx ends
// only the waiting for it.
func (c *Client) Failback(ctx context.Context, req SwitchoverRequest, emit func(Event)) (FailoverReport, error) {
	var report FailoverReport
	return report, c.run(ctx, "failback", req, emit, &report)
}

// Survivor decides a split brain in favour of this site.
func (c *Client) Survivor(ctx context.Context, req SurvivorRequest, emit func(Event)) error {
	return c.run(ctx, "survivor", req, emit, nil)
}

// Branches lists what is kept of superseded disks, or removes one.
func (c *Client) Branches(ctx context.Context, req BranchesRequest) ([]Branch, error) {
	var out []Branch
	return out, c.ask(ctx, "/v1/branches", req, &out)
}

// Set changes when a group's flushes are answered, and returns what counts now.
func (c *Client) Set(ctx context.Context, req SetRequest) (Policy, error) {
	var p Policy
	return p, c.ask(ctx, "/v1/set", req, &p)
}

// ask makes a request that is answered with one JSON value.
func (c *Client) ask(ctx context.Context, path string, req, into any) error {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	body, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := c.do(ctx, http.MethodPost, path, body)
	if err != nil {
		return err
	}
	return c.decode(ctx, resp, into)
}

func (c *Client) get(ctx context.Context, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	return c.decode(ctx, resp, into)
}

// decode reads an answer that is one JSON value.
func (c *Client) decode(ctx context.Context, resp *http.Response, into any) error {
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return c.unreachable(ctx, err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return notUnderstood(err)
	}
	return nil
}

// do sends a request; an answer that is no success becomes its error.
func (c *Client) do(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://kagami"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var l line
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err == nil {
		err = json.Unmarshal(data, &l)
	}
	if err != nil || l.Error == nil {
		return nil, notUnderstood(fmt.Errorf("status %s", resp.Status))
	}
	return nil, l.Error
}

// run starts an operation and follows its stream to the end.
func (c *Client) run(ctx context.Context, op string, req any, emit func(Event), result any) error {
	body, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	resp, err := c.do(ctx, http.MethodPost, "/v1/"+op, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(make([]byte, 0, 64<<10), maxAnswer)
	for lines.Scan() {
		ended, err := follow(lines.Bytes(), emit, result)
		if err != nil || ended {
			return err
		}
	}
	if ctx.Err() != nil {
		return &Error{Code: "interrupted", Message: "interrupted while " + op + " was running", Exit: ExitFailed}
	}
	text := "the daemon went away while " + op + " was running"
	if err := lines.Err(); err != nil {
		text += ": " + err.Error()
	}
	return &Error{Code: "broken-off", Message: text, Hint: "kagami status shows how far it got", Exit: ExitFailed}
}

// follow takes one line of a stream; it reports true with the last.
func follow(data []byte, emit func(Event), result any) (bool, error) {
	var l struct {
		Event
		Result json.RawMessage `json:"result"`
		Error  *Error          `json:"error"`
	}
	if err := json.Unmarshal(data, &l); err != nil {
		return false, notUnderstood(err)
	}
	switch {
	case l.Error != nil:
		return true, l.Error
	case l.Result == nil:
		emit(l.Event)
		return false, nil
	case result != nil:
		if err := json.Unmarshal(l.Result, result); err != nil {
			return true, notUnderstood(err)
		}
	}
	return true, nil
}

func notUnderstood(err error) *Error {
	return &Error{
		Code: "not-understood", Message: "the daemon's answer is not understood: " + err.Error(),
		Hint: "command line and daemon may be of different releases; compare kagami version", Exit: ExitFailed,
	}
}

// unreachable says why a request got no answer.
func (c *Client) unreachable(ctx context.Context, err error) *Error {
	e := &Error{Code: "unreachable", Exit: ExitUnreachable}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		e.Message = "no daemon answers on " + c.socket
		e.Hint = "start it (systemctl start kagami, or kagami daemon), or name its socket with --socket"
	case errors.Is(err, fs.ErrPermission):
		e.Message = "not allowed to use " + c.socket
		e.Hint = "use sudo, or join the group of control.group in the config file"
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.Message = fmt.Sprintf("the daemon on %s did not answer within %s", c.socket, askPatience)
		e.Hint = "look at its log: journalctl -u kagami"
	case ctx.Err() != nil:
		e.Code, e.Message, e.Exit = "interrupted", "interrupted", ExitFailed
	default:
		e.Message = "the daemon on " + c.socket + " does not answer: " + err.Error()
		e.Hint = "look at its log: journalctl -u kagami"
	}
	return e
}
