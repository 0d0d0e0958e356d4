// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// machine reads how long the CPUs were busy, by how long they were idle: the cross-check of all others. The kernel counts idle
// time from the moment when a CPU goes idle to that when it wakes (CONFIG_NO_HZ) and shows it to 10 ms. Time in interrupts it
// shows apart from that of tasks on some kernels only: see InterruptsKeptApart.
type machine struct{}

var _ Meter = machine{}

func (machine) Name() string { return "machine" }
func (machine) Doc() string {
	return "CPU of the whole machine (wall clock × CPUs − idle), of interrupts where no task is charged, and steal, to 10 ms"
}

func (machine) read(_ Site, r *Reading) error {
	content, err := os.ReadFile("/proc/stat")
	r.at = time.Now()
	if err != nil {
		return err
	}
	if r.stat, err = parseStat(string(content)); err != nil {
		return fmt.Errorf("/proc/stat: %w", err)
	}
	return nil
}

func (machine) since(before, after *Reading, cpu *CPU) {
	cpu.Wall = after.at.Sub(before.at)
	cpu.CPUs = after.stat.cpus
	cpu.Machine = cpu.Wall*time.Duration(cpu.CPUs) - ticks(before.stat.idle, after.stat.idle)
	cpu.Steal = ticks(before.stat.steal, after.stat.steal)
	if InterruptsKeptApart() {
		cpu.Interrupts = ticks(before.stat.interrupts, after.stat.interrupts)
	}
}

// ticks returns the time between two counts. USER_HZ is 100 wherever Go runs.
func ticks(before, after uint64) time.Duration {
	return time.Duration(after-before) * 10 * time.Millisecond
}

// stat is what /proc/stat says of all CPUs together, in ticks of USER_HZ since boot.
type stat struct {
	idle       uint64 // waiting for I/O included: the CPU does nothing meanwhile
	interrupts uint64 // hard and soft
	steal      uint64
	cpus       int // online
}

// parseStat reads the text of /proc/stat (proc_stat(5)).
func parseStat(text string) (stat, error) {
	const idle, ioWait, irq, softIRQ, steal = 4, 5, 6, 7, 8
	var s stat
	found := false
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 || !strings.HasPrefix(fields[0], "cpu") {
			continue
		}
		if fields[0] != "cpu" {
			s.cpus++
			continue
		}
		if len(fields) <= steal {
			return stat{}, fmt.Errorf("%d fields for all CPUs", len(fields))
		}
		for i, into := range map[int]*uint64{idle: &s.idle, ioWait: &s.idle, irq: &s.interrupts, softIRQ: &s.interrupts, steal: &s.steal} {
			count, err := strconv.ParseUint(fields[i], 10, 64)
			if err != nil {
				return stat{}, fmt.Errorf("field %d: %w", i, err)
			}
			*into += count
		}
		found = true
	}
	if !found || s.cpus == 0 {
		return stat{}, fmt.Errorf("no line for all CPUs, or none for any")
	}
	return s, nil
}
