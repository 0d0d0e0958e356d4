// SPDX-License-Identifier: Apache-2.0

// Package meters reads CPU and memory while load runs.
//
// A Site is read before and after an interval, and the difference says who used the CPUs meanwhile:
//
//	before, err := site.Read()
//	// the interval
//	after, err := site.Read()
//	cpu := after.Since(before)
//
// Readings are of the whole host, so they are taken by a process in the host's PID namespace.
package meters

import (
	"errors"
	"fmt"
	"time"
)

// Meter reads one source of CPU time.
type Meter interface {
	// Name is short and unique, Doc one sentence.
	Name() string
	Doc() string
	// read writes what the source shows now into r. What this kernel or container hides wraps errors.ErrUnsupported.
	read(site Site, r *Reading) error
	// since writes the source's share of the interval between two readings into cpu.
	since(before, after *Reading, cpu *CPU)
}

// All lists the meters in the order in which they are read.
var All = []Meter{
	kernelThreads{}, // first: it takes the longest, and the others are closest together after it
	cgroups{},
	self{},
	machine{},
}

// Site names the cgroup2 folders, as absolute paths, of what runs on one node.
type Site struct {
	Client  string   // of the client pod; "" for none
	Servers []string // of the backend pods
	Proxy   string   // of the proxy's process or pod; "" for none
	// Harness lists what serves the experiment besides, such as the control plane. The process that reads is always
	// counted as part of it, and so must not be in one of the folders.
	Harness []string
}

// Reading is what the meters showed at one moment. It means something only relative to another one.
type Reading struct {
	at                             time.Time
	client, server, proxy, harness time.Duration
	self                           time.Duration
	threads                        map[thread]time.Duration
	stat                           stat
}

// Read reads all meters. It takes a few milliseconds of CPU, which are the harness's.
func (s Site) Read() (Reading, error) {
	var r Reading
	var errs []error
	for _, m := range All {
		if err := m.read(s, &r); err != nil {
			errs = append(errs, fmt.Errorf("meter %s: %w", m.Name(), err))
		}
	}
	return r, errors.Join(errs...)
}

// Since returns the CPU time that was used between two readings of one site.
func (r Reading) Since(before Reading) CPU {
	var c CPU
	for _, m := range All {
		m.since(&before, &r, &c)
	}
	return c
}

// CPU is the CPU time that was used in an interval, and by whom. Time that one field holds is in no other, except that
// Machine holds them all and Steal is a part of it.
type CPU struct {
	Wall time.Duration // length of the interval
	CPUs int           // online at its end

	Client  time.Duration
	Server  time.Duration
	Proxy   time.Duration
	Harness time.Duration
	Kernel  time.Duration // kernel threads: ksoftirqd, kworkers, RCU and all others
	// Interrupts is the time in hard and soft interrupts, where the kernel keeps it apart from that of the task that was
	// interrupted (CONFIG_IRQ_TIME_ACCOUNTING). Zero where it does not: there it is in the other fields.
	Interrupts time.Duration

	// Machine is Wall × CPUs − idle, to 10 ms.
	Machine time.Duration
	// Steal is what the hypervisor took, to 10 ms.
	Steal time.Duration
}

// Path returns what the dataplane's work was charged to: client, servers, kernel threads and interrupts together.
func (c CPU) Path() time.Duration { return c.Client + c.Server + c.Kernel + c.Interrupts }

// Other returns what everything else used: other processes, interrupts of an idle CPU, and what the hypervisor took. The
// sources are read one after the other and at different resolutions, so that it may fall below zero by some 10 ms.
func (c CPU) Other() time.Duration { return c.Machine - c.Path() - c.Proxy - c.Harness }

// OtherShare returns Other as a share of Wall × CPUs, 0 to 1; zero for an interval without length. Above 0.05 the interval
// was not quiet.
func (c CPU) OtherShare() float64 {
	whole := c.Wall * time.Duration(c.CPUs)
	if whole <= 0 {
		return 0
	}
	return max(0, float64(c.Other())/float64(whole))
}
