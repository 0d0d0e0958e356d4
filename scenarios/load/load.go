// SPDX-License-Identifier: Apache-2.0

// Package load makes clients and servers: connects and requests paced by due time, recorded without loss.
//
// Both ends run as processes of their own inside pods: Serve is the server's program, Client the client's. The process that
// conducts the run talks to them over their standard input and output, one JSON value a line, through Server and Driver. When
// the pipes close, the programs end, so that nothing outlives a run that was killed.
//
// What is measured is one raw connect(2), from call to return, on a locked thread. Creating the socket and closing it stay
// outside the timed window. Clients close by RST (SO_LINGER {1, 0}) in every mode, so no TIME_WAIT piles up: 30,000 connects
// to one backend need no more ephemeral ports than are open at once. Connection tracking keeps a reset connection for
// nf_conntrack_tcp_timeout_close (10 s by default), which at 3,000 connects a second is 30,000 entries.
package load

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Kind is what a client does with the addresses of a Request.
type Kind string

const (
	// Connect times raw TCP connects: the measurement. The empty Kind means Connect.
	Connect Kind = "connect"
	// Calibrate makes TCP connects for as long as Limit and finds Reply.Quiet, by which connects are to be chosen.
	Calibrate Kind = "calibrate"
	// Identify connects by TCP and reads one line, the name of the server that answered.
	Identify Kind = "identify"
	// Datagram sends one datagram from a connected UDP socket and reads the reply, which names the server.
	Datagram Kind = "datagram"
	// Exchange sends a line and waits for the answer, by UDP or on a TCP connection, and times it.
	Exchange Kind = "exchange"
	// Wait connects by TCP to one address after the other, each again and again until it succeeds. Its source ports are
	// none that Connect and Identify ever take.
	Wait Kind = "wait"
)

// Timeouts and pauses of a Request that names none.
const (
	DefaultTimeout     = time.Second
	DefaultWaitTimeout = 20 * time.Millisecond
	DefaultWaitPause   = 2 * time.Millisecond
)

// timedOut is the key of operations that ran into their Timeout in Reply.Errors.
const timedOut = "timeout"

// Request is one piece of work for a client.
type Request struct {
	Kind Kind `json:"kind,omitempty"`
	// Addresses are walked in one random permutation after the other, drawn from Seed: every address is used equally
	// often (give or take one), in an order that no cache can learn. Wait takes them in the order given.
	Addresses []netip.AddrPort `json:"addresses"`
	Seed      uint64           `json:"seed,omitempty"`
	// Count is the number of operations that are recorded; Wait ignores it, and Calibrate goes through as many again and again.
	Count int `json:"count,omitempty"`
	// Warmup operations come first, in a closed loop, and are not recorded. Connect, Calibrate and Exchange only.
	Warmup int `json:"warmup,omitempty"`
	// Kept has Exchange use one socket for each address, which has exchanged something before; without, each operation has a new one.
	Kept bool `json:"kept,omitempty"`
	// Stream has Exchange use TCP, which wants Kept and a server of ServeOptions.Identify; else it is UDP, from sockets that are not connected.
	Stream bool `json:"stream,omitempty"`
	// OneWay has Exchange time the call that sends alone, which on one CPU takes the packet all the way to the receiver's socket.
	OneWay bool `json:"one_way,omitempty"`
	// Alone has the client's thread give its processor to nobody but who answers it (SCHED_FIFO), as where there is only one: a server that is
	// woken would else do its work in the middle of a call that is timed. It waits for a second until they have nothing to do, and for Connect
	// binds and closes sockets, which leaves the kernel free objects of the kind that connects take. Connect and Exchange only.
	Alone bool `json:"alone,omitempty"`
	// Rate is the number of operations due per second; zero is a closed loop. Connect only.
	Rate float64 `json:"rate,omitempty"`
	// Burst operations are due together, so that Rate is kept by one wake-up for each burst; zero and one pace each by
	// itself. With Rate only.
	Burst int `json:"burst,omitempty"`
	// Quiet, when above zero, counts only what was connected while the CPU ran at its full speed: while a reference, a short
	// run of getppid(2), took no longer than this on average. Calibrate finds it. The rest is kept apart in Reply.Disturbed.
	// While the CPU is slow the request pauses, and it goes on, up to Limit and to QuietPatience times Count, until Count
	// connects or a slice more are quiet. Connect in a closed loop only, and with a Limit: a machine may never be quiet.
	Quiet time.Duration `json:"quiet,omitempty"`
	// Patience bounds the time that a request with Quiet pauses in all, upon which it ends; zero sets no bound but Limit.
	Patience time.Duration `json:"patience,omitempty"`
	// Timeout bounds one operation; zero means DefaultTimeout, for Wait DefaultWaitTimeout.
	Timeout time.Duration `json:"timeout,omitempty"`
	// Pause is how long Wait rests between two attempts; zero means DefaultWaitPause.
	Pause time.Duration `json:"pause,omitempty"`
	// Limit bounds the whole request, so that a black hole cannot hold up a run: operations that it cuts off are
	// counted in Reply.Unsent. Zero sets no bound, which Wait, Calibrate and Quiet refuse.
	Limit time.Duration `json:"limit,omitempty"`
}

// validate fills in the defaults and says what is wrong with a request.
func (r *Request) validate() error {
	if r.Kind == "" {
		r.Kind = Connect
	}
	if len(r.Addresses) == 0 {
		return errors.New("request: no addresses")
	}
	for _, a := range r.Addresses {
		if !a.IsValid() || a.Port() == 0 {
			return fmt.Errorf("request: address %q wants an IP and a port", a)
		}
		if a.Addr().Zone() != "" {
			return fmt.Errorf("request: address %q: zones are not supported", a)
		}
	}
	if r.Count < 0 || r.Warmup < 0 || r.Timeout < 0 || r.Pause < 0 || r.Limit < 0 || !(r.Rate >= 0) || r.Rate > 1e9 {
		return errors.New("request: count, warmup, rate (at most 1e9), timeout, pause and limit must not be negative")
	}
	if r.Burst < 0 || r.Quiet < 0 || r.Patience < 0 || r.Burst > 1 && r.Rate == 0 || r.Quiet > 0 && (r.Rate > 0 || r.Kind != Connect) {
		return errors.New("request: burst goes with a rate, quiet with a closed loop of connects, and none is negative")
	}
	if r.Quiet > 0 && r.Limit == 0 {
		return errors.New("request: quiet needs a limit")
	}
	if r.Alone && r.Kind != Connect && r.Kind != Exchange {
		return errors.New("request: alone is for connects and exchanges")
	}
	if r.Kind != Exchange && (r.Kept || r.Stream || r.OneWay) || r.Stream && !r.Kept {
		return errors.New("request: kept, stream and one way are an exchange's, and a stream is kept")
	}
	switch r.Kind {
	case Connect:
	case Calibrate, Identify, Datagram, Exchange, Wait:
		if r.Rate != 0 || r.Warmup != 0 && r.Kind != Calibrate && r.Kind != Exchange {
			return fmt.Errorf("request: kind %q knows neither rate nor warmup", r.Kind)
		}
		if (r.Kind == Wait || r.Kind == Calibrate) && r.Limit == 0 {
			return fmt.Errorf("request: kind %q needs a limit", r.Kind)
		}
	default:
		return fmt.Errorf("request: unknown kind %q", r.Kind)
	}
	if r.Timeout == 0 {
		r.Timeout = DefaultTimeout
		if r.Kind == Wait {
			r.Timeout = DefaultWaitTimeout
		}
	}
	if r.Pause == 0 {
		r.Pause = DefaultWaitPause
	}
	return nil
}

// Reply is what a client saw.
type Reply struct {
	// Latencies holds, for each success in the order of sending, the nanoseconds from call to return.
	// Connect: of connect(2) alone. Identify and Datagram: from the connect to the server's name. Exchange: from the call that sends to the answer.
	Latencies []int64 `json:"latencies,omitempty"`
	// Disturbed holds the latencies that Request.Quiet did not count.
	Disturbed []int64 `json:"disturbed,omitempty"`
	// Quiet is the slowest reading of the reference at which connects are not slowed. Calibrate only.
	Quiet time.Duration `json:"quiet,omitempty"`
	// Waited is how long the client paused in disturbed moments; zero unless Request.Quiet was set.
	Waited time.Duration `json:"waited,omitempty"`
	// Errors counts failed operations by errno name ("ECONNREFUSED") or "timeout".
	Errors map[string]int64 `json:"errors,omitempty"`
	// Answered counts successes by the server's name. Identify and Datagram only.
	Answered map[string]int64 `json:"answered,omitempty"`
	// Late counts operations that began more than one interval after they were due. They were sent all the same.
	Late int64 `json:"late,omitempty"`
	// Unsent counts operations that Limit cut off (never with Request.Quiet, which asks for no exact number); for Wait, addresses that did not answer within it.
	Unsent int64 `json:"unsent,omitempty"`
	// Began is the wall clock when the first recorded operation was due; Elapsed runs from there to the last return.
	// For Wait that is the moment when the last address answered.
	Began   time.Time     `json:"began"`
	Elapsed time.Duration `json:"elapsed"`
	// CPU is what the client's process used within Elapsed, the kernel's work on its behalf included.
	CPU time.Duration `json:"cpu"`
}

// Failed returns the number of operations that were tried and failed.
func (r Reply) Failed() int64 {
	var n int64
	for _, c := range r.Errors {
		n += c
	}
	return n
}

// count adds a failed operation to Errors.
func (r *Reply) count(name string) {
	if r.Errors == nil {
		r.Errors = map[string]int64{}
	}
	r.Errors[name]++
}

// errnoName returns the key of Reply.Errors for an errno.
func errnoName(errno syscall.Errno) string {
	switch errno {
	case unix.ETIMEDOUT:
		return timedOut
	case unix.EINPROGRESS, unix.EALREADY:
		// A blocking connect(2) whose SO_SNDTIMEO ran out: EINPROGRESS the first time, EALREADY after a signal.
		return timedOut
	}
	if name := unix.ErrnoName(errno); name != "" {
		return name
	}
	return fmt.Sprintf("errno %d", int(errno))
}

// processCPU returns the CPU time that this process has used, dead threads included.
func processCPU() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		return 0 // the clock exists in every kernel since Linux 2.6.12
	}
	return time.Duration(ts.Nano())
}
