// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Programs has the kernel time each run of every BPF program until it is closed, which makes runs a little longer: no latency is to be measured
// meanwhile. It needs CAP_SYS_ADMIN.
type Programs struct{ stats io.Closer }

// StartPrograms begins to time the kernel's BPF programs.
func StartPrograms() (*Programs, error) {
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("time BPF programs: %w", err)
	}
	return &Programs{stats}, nil
}

// Close ends the timing.
func (p *Programs) Close() error { return p.stats.Close() }

// Used is how long all BPF programs of this kernel have run, since each was loaded, while somebody timed them.
func (p *Programs) Used() (time.Duration, error) {
	var sum time.Duration
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return sum, nil
		} else if err != nil {
			return 0, fmt.Errorf("list BPF programs: %w", err)
		}
		id = next
		program, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // it is gone
		} else if err != nil {
			return 0, fmt.Errorf("open a BPF program: %w", err)
		}
		stats, err := program.Stats()
		if err = errors.Join(err, program.Close()); err != nil {
			return 0, fmt.Errorf("read a BPF program's statistics: %w", err)
		}
		sum += stats.Runtime
	}
}
