// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ServeOptions says what a server listens on. Port 0 takes any free port; Report says which.
type ServeOptions struct {
	// Connect lists what is accepted every 5 ms and closed 5 ms later, unread and unanswered: the measured path.
	Connect []netip.AddrPort
	// Identify lists TCP addresses where the server writes Name and a line feed on each new connection, and again for each
	// line that it reads, until the client closes.
	Identify []netip.AddrPort
	// Datagram lists UDP addresses where the server answers each datagram with Name, a line feed and the datagram.
	Datagram []netip.AddrPort
	// Name is the server's, without a line feed.
	Name string
	// Somaxconn is written to net.core.somaxconn of the network namespace that the server runs in, as the accept queue must
	// hold 5 ms of connects and more when the machine is busy, unless it is as high already. Zero leaves the namespace as it is.
	Somaxconn int
}

// Report is what a server says when it is ready, and whenever it is asked.
type Report struct {
	Error string `json:"error,omitempty"`
	// Connect, Identify and Datagram list the addresses that it listens on, in the order of ServeOptions.
	Connect  []netip.AddrPort `json:"connect,omitempty"`
	Identify []netip.AddrPort `json:"identify,omitempty"`
	Datagram []netip.AddrPort `json:"datagram,omitempty"`
	// Accepted counts the connections that were drained from the measured path.
	Accepted int64 `json:"accepted"`
	// Overflows and Drops are TcpExt's ListenOverflows and ListenDrops of the server's network namespace since it began:
	// connections that found the accept queue full. Each is a SYN that comes again after a second.
	Overflows int64 `json:"overflows"`
	Drops     int64 `json:"drops"`
}

// server is a Serve at work.
type server struct {
	options  ServeOptions
	queues   []int // listening sockets of the measured path
	tcp      []*net.TCPListener
	udp      []*net.UDPConn
	accepted atomic.Int64
	report   Report // as it was at the beginning
	before   listenCounts
}

// Serve is the backend pod's program: it listens, writes a Report as one JSON line to out, and writes another for each JSON
// value that it reads from in. It returns nil when in or ctx ends, and an error when it cannot listen, read or write.
func Serve(ctx context.Context, options ServeOptions, in io.Reader, out io.Writer) (err error) {
	s := &server{options: options}
	// Raised before the sockets listen, because listen(2) takes the cap of that moment.
	if options.Somaxconn > 0 {
		if err := raiseAcceptQueue(options.Somaxconn); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.listen(ctx); err != nil {
		return err
	}
	if s.before, err = readListenCounts(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	if len(s.queues) > 0 {
		running.Go(func() { s.drain(ctx) })
	}
	for _, l := range s.tcp {
		running.Go(func() { s.identify(ctx, l) })
	}
	for _, c := range s.udp {
		running.Go(func() { s.echo(ctx, c) })
	}
	return s.answer(ctx, in, out)
}

// answer writes the first report and one more for each value on in.
func (s *server) answer(ctx context.Context, in io.Reader, out io.Writer) error {
	encoder := json.NewEncoder(out)
	if err := encoder.Encode(s.now()); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	questions := make(chan error)
	go func() {
		decoder := json.NewDecoder(in)
		for {
			var question json.RawMessage
			err := decoder.Decode(&question)
			select {
			case questions <- err:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		select {
		case err := <-questions:
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("read question: %w", err)
			}
			if err := encoder.Encode(s.now()); err != nil {
				return fmt.Errorf("write report: %w", err)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// now returns the report of this moment.
func (s *server) now() Report {
	r := s.report
	r.Accepted = s.accepted.Load()
	counts, err := readListenCounts()
	if err != nil {
		r.Error = err.Error()
		return r
	}
	r.Overflows, r.Drops = counts.overflows-s.before.overflows, counts.drops-s.before.drops
	return r
}

func (s *server) listen(ctx context.Context) error {
	for _, a := range s.options.Connect {
		socket, bound, err := listenQueue(a)
		if err != nil {
			return fmt.Errorf("listen on %s: %w", a, err)
		}
		s.queues = append(s.queues, socket)
		s.report.Connect = append(s.report.Connect, bound)
	}
	var config net.ListenConfig
	for _, a := range s.options.Identify {
		l, err := config.Listen(ctx, "tcp", a.String())
		if err != nil {
			return err
		}
		s.tcp = append(s.tcp, l.(*net.TCPListener))
		s.report.Identify = append(s.report.Identify, l.Addr().(*net.TCPAddr).AddrPort())
	}
	for _, a := range s.options.Datagram {
		c, err := config.ListenPacket(ctx, "udp", a.String())
		if err != nil {
			return err
		}
		s.udp = append(s.udp, c.(*net.UDPConn))
		s.report.Datagram = append(s.report.Datagram, c.LocalAddr().(*net.UDPAddr).AddrPort())
	}
	return nil
}

// close closes what listens. Listeners that their goroutine has closed already are no error.
func (s *server) close() error {
	var errs []error
	for _, socket := range s.queues {
		errs = append(errs, os.NewSyscallError("close", unix.Close(socket)))
	}
	for _, l := range s.tcp {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	for _, c := range s.udp {
		if err := c.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// raiseAcceptQueue sets net.core.somaxconn unless it is as high already: a pod's own settings are often read-only to it.
func raiseAcceptQueue(n int) error {
	const file = "/proc/sys/net/core/somaxconn"
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read the limit of accept queues: %w", err)
	}
	if now, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && now >= n {
		return nil
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(n)), 0); err != nil {
		return fmt.Errorf("raise the accept queue: %w", err)
	}
	return nil
}
