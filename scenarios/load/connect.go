// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockaddr is a socket address as connect(2) reads it.
type sockaddr struct {
	raw    [unix.SizeofSockaddrInet6]byte
	size   uint32
	family int
}

func newSockaddr(a netip.AddrPort) sockaddr {
	var s sockaddr
	// A v4-mapped IPv6 address stays what it is: it takes another way through the kernel than the IPv4 address does.
	s.family, s.size = unix.AF_INET, unix.SizeofSockaddrInet4
	address := s.raw[4:8]
	if !a.Addr().Is4() {
		s.family, s.size = unix.AF_INET6, unix.SizeofSockaddrInet6
		address = s.raw[8:24]
	}
	binary.NativeEndian.PutUint16(s.raw[0:2], uint16(s.family))
	binary.BigEndian.PutUint16(s.raw[2:4], a.Port())
	copy(address, a.Addr().AsSlice())
	return s
}

// connects is a Connect or Calibrate request with all that the timed loop needs allocated and warm.
type connects struct {
	request Request
	targets []sockaddr
	order   []uint32
	// current is the address that is passed to the kernel. It is copied from targets before the clock starts, so that
	// walking 50,000 addresses does not charge the client's own cache misses to the dataplane.
	current sockaddr
	timeout unix.Timeval
	made    int       // connects of quietLoop and calibrate
	base    time.Time // what the loop's nanoseconds are relative to
	reply   Reply
}

// prepareConnects builds the addresses and their order and makes the warm-up connects.
func prepareConnects(ctx context.Context, request Request) (*connects, error) {
	c := &connects{
		request: request,
		targets: make([]sockaddr, len(request.Addresses)),
		order:   order(request.Seed, 1, len(request.Addresses), request.operations()),
		timeout: unix.NsecToTimeval(max(request.Timeout, time.Microsecond).Nanoseconds()),
	}
	for i, a := range request.Addresses {
		c.targets[i] = newSockaddr(a)
	}
	c.reply.Latencies = make([]int64, 0, request.operations())
	if request.Quiet > 0 {
		c.reply.Disturbed = make([]int64, 0, request.operations())
	}
	c.reply.Errors = make(map[string]int64, 8)
	warmup := order(request.Seed, 2, len(request.Addresses), request.Warmup)
	// What the request left behind is collected now, and nothing is while the loop runs.
	runtime.GC()
	if len(c.order) == 0 && request.Kind == Calibrate {
		return nil, errors.New("request: kind \"calibrate\" needs a count")
	}
	return c, onThread(func() error {
		c.base = time.Now()
		for _, target := range warmup {
			if c.over(ctx, time.Since(c.base)) {
				break
			}
			socket, err := c.socket(target)
			if err != nil {
				return fmt.Errorf("warm-up: %w", err)
			}
			c.connect(socket)
			unix.Close(socket)
		}
		return nil
	})
}

// run makes the recorded connects. It ends early when ctx does; what was recorded until then is in the reply.
func (c *connects) run(ctx context.Context) (Reply, error) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	err := onThread(func() error {
		if c.request.Rate > 0 {
			// Timer slack delays a sleep by up to 50 µs to wake several sleepers at once. It is the thread's own.
			if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
				return fmt.Errorf("set timer slack: %w", err)
			}
		}
		if c.request.Alone {
			if err := alone(); err != nil {
				return err
			}
			if err := stockBuckets(); err != nil {
				return err
			}
		}
		switch {
		case c.request.Kind == Calibrate:
			return c.calibrate(ctx)
		case c.request.Quiet > 0:
			return c.quietLoop(ctx)
		}
		return c.loop(ctx)
	})
	return c.reply, err
}

func (c *connects) loop(ctx context.Context) error {
	cpu := processCPU()
	c.base = time.Now()
	start, err := monotonic(c.base)
	if err != nil {
		return err
	}
	burst := max(c.request.Burst, 1)
	var interval time.Duration
	if c.request.Rate > 0 {
		interval = time.Duration(float64(burst) / c.request.Rate * float64(time.Second))
	}
	var last time.Duration
	for i, target := range c.order {
		if now := time.Since(c.base); c.over(ctx, now) {
			c.reply.Unsent = int64(len(c.order) - i)
			break
		}
		socket, err := c.socket(target)
		if err != nil {
			return err
		}
		var due time.Duration
		if c.request.Rate > 0 {
			due = time.Duration(float64(i-i%burst) / c.request.Rate * float64(time.Second))
			if time.Since(c.base) < due {
				sleepUntil(start + due.Nanoseconds())
			}
		}
		called, returned, errno := c.connect(socket)
		unix.Close(socket)
		last = returned
		if c.request.Rate > 0 && called-due > interval {
			c.reply.Late++
		}
		if errno != 0 {
			c.reply.count(errnoName(errno))
			continue
		}
		c.reply.Latencies = append(c.reply.Latencies, int64(returned-called))
	}
	c.reply.Began, c.reply.Elapsed = c.base, last
	c.reply.CPU = processCPU() - cpu
	return ctx.Err()
}

// over reports whether the request's limit or the context ends the loop before the next operation.
func (c *connects) over(ctx context.Context, elapsed time.Duration) bool {
	return c.request.Limit > 0 && elapsed >= c.request.Limit || ctx.Err() != nil
}

// socket makes target current and returns a blocking socket that closes by RST and gives up connecting after the timeout.
func (c *connects) socket(target uint32) (int, error) {
	c.current = c.targets[target]
	socket, err := unix.Socket(c.current.family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("create socket: %w", err)
	}
	if err := unix.SetsockoptLinger(socket, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		unix.Close(socket)
		return -1, fmt.Errorf("set SO_LINGER: %w", err)
	}
	if err := unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &c.timeout); err != nil {
		unix.Close(socket)
		return -1, fmt.Errorf("set SO_SNDTIMEO: %w", err)
	}
	return socket, nil
}

// connect calls connect(2) for the current address and returns when it was called and when it returned, since c.base.
func (c *connects) connect(socket int) (called, returned time.Duration, errno syscall.Errno) {
	called = time.Since(c.base)
	for {
		// The raw form spares the hand-over to the Go scheduler on both sides of the call.
		_, _, errno = unix.RawSyscall(unix.SYS_CONNECT, uintptr(socket), uintptr(unsafe.Pointer(&c.current.raw)), uintptr(c.current.size))
		returned = time.Since(c.base)
		if errno != unix.EINTR {
			return called, returned, errno
		}
		if returned-called >= c.request.Timeout {
			return called, returned, unix.ETIMEDOUT
		}
	}
}

// monotonic returns what CLOCK_MONOTONIC showed at base, in nanoseconds, or up to a fraction of a microsecond more: who
// sleeps by it wakes late, never early. The best of ten readings is taken, since any of them may be interrupted.
func monotonic(base time.Time) (int64, error) {
	var start int64
	best := time.Duration(math.MaxInt64)
	for range 10 {
		var clock unix.Timespec
		before := time.Since(base)
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &clock); err != nil {
			return 0, fmt.Errorf("read the monotonic clock: %w", err)
		}
		if took := time.Since(base) - before; took < best {
			start, best = clock.Nano()-before.Nanoseconds(), took
		}
	}
	return start, nil
}

// sleepUntil sleeps until the monotonic clock shows so many nanoseconds.
func sleepUntil(nanoseconds int64) {
	until := unix.NsecToTimespec(nanoseconds)
	for {
		_, _, errno := unix.RawSyscall6(unix.SYS_CLOCK_NANOSLEEP, unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME, uintptr(unsafe.Pointer(&until)), 0, 0, 0)
		if errno != unix.EINTR {
			return
		}
	}
}

// drainTime is more than servers need to accept and close what earlier connects left them.
const drainTime = time.Second

// alone has the calling thread give its processor to no thread but those of the kernel's own that go before it. It dies with the thread. All
// servers wait in poll(2) by then and stay there: one that had been interrupted at its work is not told of more, and what wakes it takes some
// 210 instructions less.
func alone() error {
	if err := unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0); err != nil {
		return fmt.Errorf("take a processor alone: %w", err)
	}
	time.Sleep(drainTime)
	return nil
}

// buckets is more than what the kernel's lists of begun slabs have free of the objects by which it knows a port's bound sockets: some 64
// are a page.
const buckets = 256

// stockBuckets leaves the kernel a page of those objects with free ones on it (tcp_bind2_bucket). A connect takes two and gives them back, which
// would else be one from a page of its own, with 142 instructions more for each (___slab_alloc), for as long as nobody else takes any: all
// connects of a request, or none, as it happened.
func stockBuckets() (err error) {
	sockets := make([]int, 0, buckets)
	defer func() {
		for _, socket := range sockets {
			err = errors.Join(err, unix.Close(socket))
		}
	}()
	for range buckets {
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("create socket: %w", err)
		}
		sockets = append(sockets, socket)
		if err := unix.Bind(socket, &unix.SockaddrInet4{}); err != nil {
			return fmt.Errorf("bind a socket: %w", err)
		}
	}
	return nil
}

// onThread runs f on an operating system thread of its own, which ends with it.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread's signal mask and timer slack die with the thread.
		runtime.LockOSThread()
		// Subtle: the Go runtime preempts by SIGURG whatever has run for 10 ms, and a raw system call looks as if it ran.
		// The signal would interrupt a connect that waits for its timeout. Blocked, it costs nothing, and a collector that
		// must stop the world waits until f calls its next function.
		var mask unix.Sigset_t
		mask.Val[0] = 1 << (unix.SIGURG - 1)
		if err := unix.PthreadSigmask(unix.SIG_BLOCK, &mask, nil); err != nil {
			done <- fmt.Errorf("block SIGURG: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}
