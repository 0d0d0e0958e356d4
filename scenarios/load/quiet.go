// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// The core of a virtual machine's CPU is shared with neighbours that the machine cannot see, for milliseconds or for seconds at
// a time. On the machine where this was found, the same connect took 17, 19.5, 21.5 or 24.5 µs, whichever way client and server
// were pinned, and getppid(2) took 174 or 230 ns in step with it, while plain arithmetic stayed within 3 %: another hardware
// thread was at work in the same core. Nothing of that belongs to a dataplane. So the client asks how fast the CPU is right now,
// by a system call that no mode touches, before and after every slice of connects, waits while it is slow, and counts the slices in
// which it was as fast as it gets (calibrate says how fast that is). The choice is made by the reference alone, never by how long a connect took.
const (
	// referenceCalls are one reading: 6 µs.
	referenceCalls = 32
	// slice is how long connects go on between two readings; a connect that takes longer has a slice of its own.
	slice = 300 * time.Microsecond
	// hopAfter is how many slow readings send the client to another CPU: as many as take longer than getting there.
	hopAfter = 50
)

// QuietPatience is how many times Count is connected at most for Count that are quiet.
const QuietPatience = 6

// operations is how many connects a request makes at most.
func (r Request) operations() int {
	if r.Quiet > 0 {
		return QuietPatience * r.Count
	}
	return r.Count
}

// readReference is how long referenceCalls take now.
func readReference(base time.Time) time.Duration {
	began := time.Since(base)
	for range referenceCalls {
		unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0)
	}
	return time.Since(base) - began
}

// quietLoop is loop for a request with Quiet.
func (c *connects) quietLoop(ctx context.Context) error {
	cpu := processCPU()
	c.base = time.Now()
	before := readReference(c.base)
	quiet := func(took time.Duration) bool { return took <= c.request.Quiet }
	cpus, err := newCPUs()
	if err != nil {
		return err
	}
	made, counted := 0, 0
	for made < len(c.order) && counted < c.request.Count && !c.over(ctx, time.Since(c.base)) {
		// Half of all quiet moments are part of a spell of a millisecond or more, and disturbed spells last for up to seconds:
		// connects in them would only fill the connection tracking. Each CPU has neighbours of its own.
		waiting := time.Since(c.base)
		waited := !quiet(before)
		for slow := 1; !quiet(before); slow++ {
			now := time.Since(c.base)
			if c.over(ctx, now) || c.request.Patience > 0 && c.reply.Waited+now-waiting >= c.request.Patience {
				break
			}
			if slow%hopAfter == 0 {
				if err := cpus.hop(); err != nil {
					return err
				}
			}
			before = readReference(c.base)
		}
		if waited {
			c.reply.Waited += time.Since(c.base) - waiting
		}
		if !quiet(before) {
			break
		}
		// What a slice adds to Latencies is moved to Disturbed when it was not quiet. So is the one connect after a wait, which
		// brings back into the caches what the wait has lost.
		began := time.Since(c.base)
		for first := true; first || !waited && made < len(c.order) && time.Since(c.base)-began < slice; first = false {
			socket, err := c.socket(c.order[made])
			if err != nil {
				return err
			}
			called, returned, errno := c.connect(socket)
			unix.Close(socket)
			made++
			if errno != 0 {
				c.reply.count(errnoName(errno))
				continue
			}
			c.reply.Latencies = append(c.reply.Latencies, int64(returned-called))
		}
		after := readReference(c.base)
		if waited || !quiet(after) {
			c.reply.Disturbed = append(c.reply.Disturbed, c.reply.Latencies[counted:]...)
			c.reply.Latencies = c.reply.Latencies[:counted]
		}
		counted = len(c.reply.Latencies)
		before = after
	}
	c.reply.Began, c.reply.Elapsed = c.base, time.Since(c.base)
	c.reply.CPU = processCPU() - cpu
	return ctx.Err()
}

// cpus are the CPUs that the calling thread may run on.
type cpus struct {
	allowed []int
	next    int
}

func newCPUs() (*cpus, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("read CPU affinity: %w", err)
	}
	c := &cpus{}
	for i := 0; len(c.allowed) < set.Count(); i++ {
		if set.IsSet(i) {
			c.allowed = append(c.allowed, i)
		}
	}
	return c, nil
}

// hop moves the calling thread, which ends with its request, to the next CPU.
func (c *cpus) hop() error {
	c.next = (c.next + 1) % len(c.allowed)
	var set unix.CPUSet
	set.Set(c.allowed[c.next])
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("set CPU affinity: %w", err)
	}
	return nil
}
