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
// by a system call that no mode touches, before and after every slice of connects, pauses while it is slow, and counts the slices around
// which it was as fast as it gets (calibrate says how fast that is). The choice is made by the reference alone, never by how long a
// connect took.
const (
	// referenceCalls are one reading: 4 to 6 µs.
	referenceCalls = 32
	// slice is how long connects go on between two readings; a connect that takes longer has a slice of its own.
	slice = 300 * time.Microsecond
	// pause is how long the client leaves a disturbed CPU alone before it tries again: half of all quiet moments are part of a
	// spell of a millisecond or more, and disturbed spells last for up to seconds.
	pause = 2 * time.Millisecond
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

// window holds the last readings on one CPU: two before a slice of connects and two after it. One reading alone scatters by
// several percent, as much as some disturbances change it, but the next one scatters anew.
type window struct {
	readings [4]time.Duration
	n        int
}

func (w *window) add(reading time.Duration) {
	w.readings[w.n%len(w.readings)] = reading
	w.n++
}

// mean is over the window; it is not known before the window is full.
func (w *window) mean() (mean time.Duration, known bool) {
	for _, r := range w.readings {
		mean += r / time.Duration(len(w.readings))
	}
	return mean, w.n >= len(w.readings)
}

// slice makes connects for as long as a slice takes, one at least, appends the times of those that succeed to took, and adds the
// reading that follows to w, to an empty window the one before too. The slice is cold then: what the caches hold is not of
// connects. It goes through the order again when that is at its end.
func (c *connects) slice(w *window, took []int64) (_ []int64, cold bool, err error) {
	if cold = w.n == 0; cold {
		w.add(readReference(c.base))
	}
	began := time.Since(c.base)
	for first := true; first || time.Since(c.base)-began < slice; first = false {
		socket, err := c.socket(c.order[c.made%len(c.order)])
		if err != nil {
			return nil, cold, err
		}
		called, returned, errno := c.connect(socket)
		unix.Close(socket)
		c.made++
		if errno != 0 {
			c.reply.count(errnoName(errno))
			continue
		}
		took = append(took, int64(returned-called))
	}
	w.add(readReference(c.base))
	return took, cold, nil
}

// quietLoop is loop for a request with Quiet.
func (c *connects) quietLoop(ctx context.Context) error {
	cpu := processCPU()
	c.base = time.Now()
	cpus, err := newCPUs()
	if err != nil {
		return err
	}
	var w window
	var last, current []int64 // slices; the last one is not judged before there are two readings after it
	for c.made < len(c.order) && len(c.reply.Latencies) < c.request.Count && !c.over(ctx, time.Since(c.base)) {
		if mean, known := w.mean(); known && mean > c.request.Quiet {
			if c.request.Patience > 0 && c.reply.Waited >= c.request.Patience {
				break
			}
			c.reply.Disturbed = append(c.reply.Disturbed, last...)
			last = last[:0]
			// Each CPU has neighbours of its own. Spinning keeps it awake.
			if err := cpus.hop(); err != nil {
				return err
			}
			began := time.Since(c.base)
			for now := began; now-began < pause && !c.over(ctx, now); now = time.Since(c.base) {
				readReference(c.base)
			}
			c.reply.Waited += time.Since(c.base) - began
			w = window{}
		}
		var cold bool
		if current, cold, err = c.slice(&w, current[:0]); err != nil {
			return err
		}
		if mean, known := w.mean(); known && mean <= c.request.Quiet {
			c.reply.Latencies = append(c.reply.Latencies, last...)
		} else {
			c.reply.Disturbed = append(c.reply.Disturbed, last...)
		}
		if cold {
			c.reply.Disturbed = append(c.reply.Disturbed, current...)
			current = current[:0]
		}
		last, current = current, last
	}
	c.reply.Disturbed = append(c.reply.Disturbed, last...)
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
