// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Driver conducts one Client over its standard input and output. Its calls come one after the other; a call that was given
// up because its context ended leaves the client at work, and every later call fails: close the driver.
type Driver struct {
	lines *lines
}

// NewDriver returns the driver of the client that reads stdin and writes stdout.
func NewDriver(stdin io.WriteCloser, stdout io.Reader) *Driver {
	return &Driver{lines: newLines(stdin, stdout)}
}

// Do has the client carry out a request and returns what it saw. Failed operations are in the reply, not in the error: an
// error means that the request was wrong, or that the client could not work or went away.
func (d *Driver) Do(ctx context.Context, request Request) (Reply, error) {
	if err := d.Prepare(ctx, request); err != nil {
		return Reply{}, err
	}
	if err := d.Run(ctx); err != nil {
		return Reply{}, err
	}
	return d.Collect(ctx)
}

// Prepare hands a request over and returns once the client has parsed it and made its warm-up connects. Prepare, Run and
// Collect are the steps of Do, for callers that read meters around Run and want nothing else in their readings.
func (d *Driver) Prepare(ctx context.Context, request Request) error {
	_, err := d.call(ctx, command{Step: prepare, Request: &request})
	return err
}

// Run has the client do what was prepared and returns when it is done.
func (d *Driver) Run(ctx context.Context) error {
	_, err := d.call(ctx, command{Step: run})
	return err
}

// Collect returns the reply of the last Run.
func (d *Driver) Collect(ctx context.Context) (Reply, error) {
	a, err := d.call(ctx, command{Step: collect})
	if err != nil {
		return Reply{}, err
	}
	if a.Reply == nil {
		return Reply{}, errors.New("client: answer without a reply")
	}
	return *a.Reply, nil
}

// Close closes the client's standard input, upon which the client ends.
func (d *Driver) Close() error { return d.lines.close() }

func (d *Driver) call(ctx context.Context, c command) (result, error) {
	var a result
	if err := d.lines.call(ctx, c, &a); err != nil {
		return a, fmt.Errorf("client: %s: %w", c.Step, err)
	}
	if a.Error != "" {
		return a, fmt.Errorf("client: %s", a.Error)
	}
	return a, nil
}

// Server watches one Serve over its standard input and output.
type Server struct {
	lines *lines
}

// NewServer returns the watcher of the server that reads stdin and writes stdout.
func NewServer(stdin io.WriteCloser, stdout io.Reader) *Server {
	return &Server{lines: newLines(stdin, stdout)}
}

// Ready returns the server's first report, which it writes once it listens. It is called once, before Report.
func (s *Server) Ready(ctx context.Context) (Report, error) { return s.read(ctx, nil) }

// Report asks the server for its counts.
func (s *Server) Report(ctx context.Context) (Report, error) { return s.read(ctx, struct{}{}) }

// Close closes the server's standard input, upon which the server ends.
func (s *Server) Close() error { return s.lines.close() }

func (s *Server) read(ctx context.Context, question any) (Report, error) {
	var r Report
	if err := s.lines.call(ctx, question, &r); err != nil {
		return r, fmt.Errorf("server: %w", err)
	}
	if r.Error != "" {
		return r, fmt.Errorf("server: %s", r.Error)
	}
	return r, nil
}

// lines is a conversation with a child over its pipes, in JSON, one answer to one question.
type lines struct {
	stdin   io.WriteCloser
	encoder *json.Encoder
	answers chan json.RawMessage // closed when the child's output ends
	closed  chan struct{}
	once    sync.Once
	ended   error // why answers was closed

	mu   sync.Mutex // held through a call
	lost error      // guarded by mu; why the conversation cannot go on
}

func newLines(stdin io.WriteCloser, stdout io.Reader) *lines {
	l := &lines{stdin: stdin, encoder: json.NewEncoder(stdin), answers: make(chan json.RawMessage), closed: make(chan struct{})}
	go func() {
		defer close(l.answers)
		decoder := json.NewDecoder(stdout)
		for {
			var answer json.RawMessage
			if l.ended = decoder.Decode(&answer); l.ended != nil {
				return
			}
			select {
			case l.answers <- answer:
			case <-l.closed:
				l.ended = errors.New("closed")
				return
			}
		}
	}()
	return l
}

// call writes a question, unless it is nil, and decodes the next answer.
func (l *lines) call(ctx context.Context, question, answer any) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost != nil {
		return l.lost
	}
	written := make(chan error, 1)
	go func() {
		// A child that does not read must not hold up a caller whose context ends: Close ends the write.
		if question == nil {
			written <- nil
			return
		}
		written <- l.encoder.Encode(question)
	}()
	select {
	case err := <-written:
		if err != nil {
			l.lost = fmt.Errorf("write: %w", err)
			return l.lost
		}
	case <-ctx.Done():
		l.lost = fmt.Errorf("given up: %w", context.Cause(ctx))
		return l.lost
	}
	select {
	case line, ok := <-l.answers:
		if !ok {
			l.lost = fmt.Errorf("its output ended: %w", l.ended)
			return l.lost
		}
		if err := json.Unmarshal(line, answer); err != nil {
			l.lost = fmt.Errorf("read answer: %w", err)
			return l.lost
		}
		return nil
	case <-ctx.Done():
		l.lost = fmt.Errorf("given up: %w", context.Cause(ctx))
		return l.lost
	}
}

func (l *lines) close() error {
	var err error
	l.once.Do(func() {
		close(l.closed)
		err = l.stdin.Close()
	})
	return err
}
