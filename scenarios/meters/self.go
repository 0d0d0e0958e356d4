// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// self reads the CPU time of the process that reads, which belongs to the harness.
type self struct{}

var _ Meter = self{}

func (self) Name() string { return "self" }
func (self) Doc() string  { return "CPU of plimsoll's own process, exact, from its CPU clock" }

func (self) read(_ Site, r *Reading) (err error) {
	r.self, err = readClock(unix.CLOCK_PROCESS_CPUTIME_ID)
	return err
}

func (self) since(before, after *Reading, cpu *CPU) { cpu.Harness += after.self - before.self }

// processClock returns the CPU clock of a process: all threads, dead ones included, running ones to the nanosecond. It is
// what clock_getcpuclockid(3) returns (include/linux/posix-timers_types.h: MAKE_PROCESS_CPUCLOCK with CPUCLOCK_SCHED).
//
// Note: /proc/PID/schedstat was tried; it shows one thread, lags by a tick, and needs CONFIG_SCHED_INFO.
func processClock(pid int) int32 { return ^int32(pid)<<3 | 2 }

func readClock(clock int32) (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(clock, &ts); err != nil {
		return 0, fmt.Errorf("read CPU clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}
