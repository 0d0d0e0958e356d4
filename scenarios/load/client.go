// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
)

// step is what the driver asks of a client next.
type step string

const (
	prepare step = "prepare" // take the request, build its addresses, make the warm-up connects
	run     step = "run"     // do the work, keep the reply
	collect step = "collect" // hand the reply over
)

// command and result are the lines that go to a client and come back, one for one.
type command struct {
	Step    step     `json:"step"`
	Request *Request `json:"request,omitempty"` // with prepare
}

type result struct {
	Error string `json:"error,omitempty"`
	Reply *Reply `json:"reply,omitempty"` // to collect
}

// Client is the client pod's program: commands of a Driver in, answers out, one at a time, until in ends or ctx does.
// It returns nil when in ends, and an error when it cannot read or write.
func Client(ctx context.Context, in io.Reader, out io.Writer) error {
	// The timed loop keeps one P through its system calls, the rest of the program needs another.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	commands := make(chan command)
	go func() {
		decoder := json.NewDecoder(in)
		for {
			var c command
			if err := decoder.Decode(&c); err != nil {
				cancel(fmt.Errorf("read command: %w", err)) // ends the work in hand, too
				return
			}
			select {
			case commands <- c:
			case <-ctx.Done():
				return
			}
		}
	}()
	var s session
	encoder := json.NewEncoder(out)
	for {
		select {
		case c := <-commands:
			var a result
			if reply, err := s.take(ctx, c); err != nil {
				a.Error = err.Error()
			} else {
				a.Reply = reply
			}
			if ctx.Err() != nil {
				break // nobody waits for the answer
			}
			if err := encoder.Encode(a); err != nil {
				return fmt.Errorf("write answer: %w", err)
			}
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			if cause := context.Cause(ctx); !errors.Is(cause, io.EOF) {
				return cause
			}
			return nil
		}
	}
}

// session is a client between two commands.
type session struct {
	work  func(context.Context) (Reply, error) // set by prepare, used up by run
	reply *Reply                               // set by run, used up by collect
	ports waitPorts                            // taken from by every Wait
}

func (s *session) take(ctx context.Context, c command) (*Reply, error) {
	switch {
	case c.Step == prepare && c.Request != nil:
		s.work, s.reply = nil, nil
		return nil, s.prepare(ctx, *c.Request)
	case c.Step == run && s.work != nil:
		reply, err := s.work(ctx)
		s.work = nil
		if err != nil {
			return nil, err
		}
		s.reply = &reply
		return nil, nil
	case c.Step == collect && s.reply != nil:
		reply := s.reply
		s.reply = nil
		return reply, nil
	}
	return nil, fmt.Errorf("command %q out of order", c.Step)
}

func (s *session) prepare(ctx context.Context, request Request) error {
	if err := request.validate(); err != nil {
		return err
	}
	switch request.Kind {
	case Connect, Calibrate:
		c, err := prepareConnects(ctx, request)
		if err != nil {
			return err
		}
		s.work = c.run
	case Wait:
		s.work = func(ctx context.Context) (Reply, error) { return wait(ctx, request, &s.ports) }
	case Exchange:
		s.work = func(ctx context.Context) (Reply, error) { return exchange(ctx, request) }
	default:
		s.work = func(ctx context.Context) (Reply, error) { return identify(ctx, request) }
	}
	return nil
}
