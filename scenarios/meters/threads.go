// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// kernelThreads reads the CPU time of all kernel threads. What one that ends within an interval used in it is not seen.
type kernelThreads struct{}

var _ Meter = kernelThreads{}

func (kernelThreads) Name() string { return "kernel-threads" }
func (kernelThreads) Doc() string {
	return "CPU of ksoftirqd, kworkers, RCU and all other kernel threads, exact, from their CPU clocks"
}

// thread tells kernel threads apart though their process IDs are used again.
type thread struct {
	pid     int
	started uint64 // in clock ticks since boot
}

func (kernelThreads) read(_ Site, r *Reading) error {
	proc, err := os.Open("/proc")
	if err != nil {
		return err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return err
	}
	r.threads = make(map[thread]time.Duration, 256)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue // not a process
		}
		content, err := os.ReadFile("/proc/" + name + "/stat")
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			return err
		}
		task, err := parseTask(string(content))
		if err != nil {
			return fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		if !task.kernel {
			continue
		}
		used, err := readClock(processClock(pid))
		if errors.Is(err, unix.EINVAL) {
			continue // it has ended meanwhile
		}
		if err != nil {
			return err
		}
		r.threads[thread{pid, task.started}] = used
	}
	if len(r.threads) == 0 {
		return fmt.Errorf("no kernel threads in /proc, this is not the host's PID namespace: %w", errors.ErrUnsupported)
	}
	return nil
}

func (kernelThreads) since(before, after *Reading, cpu *CPU) {
	for t, used := range after.threads {
		cpu.Kernel += used - before.threads[t] // all of it, for a thread that is new
	}
}

// task is what /proc/PID/stat says of interest.
type task struct {
	kernel  bool // PF_KTHREAD
	started uint64
}

// parseTask reads the text of /proc/PID/stat (proc_pid_stat(5)): PID, name in parentheses, which may hold any character, then
// state as field 3.
func parseTask(text string) (task, error) {
	const (
		flags     = 9 - 3
		startTime = 22 - 3
		pfKThread = 0x00200000 // include/linux/sched.h
	)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) <= startTime {
		return task{}, fmt.Errorf("%d fields after the name", len(fields))
	}
	bits, err := strconv.ParseUint(fields[flags], 10, 64)
	if err != nil {
		return task{}, fmt.Errorf("flags: %w", err)
	}
	started, err := strconv.ParseUint(fields[startTime], 10, 64)
	if err != nil {
		return task{}, fmt.Errorf("start time: %w", err)
	}
	return task{kernel: bits&pfKThread != 0, started: started}, nil
}
