// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/pflag"

	"github.com/plimsoll-bench/plimsoll/clusters/guest"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios"
)

// guestOptions are the flags of guests.
type guestOptions struct {
	kernel  string
	pack    string
	side    int
	memory  int
	timeout time.Duration
}

func (o *guestOptions) bind(f *pflag.FlagSet) {
	f.StringVar(&o.kernel, "kernel", "", "bzImage of guests, with its modules in lib/modules beside its folder")
	f.StringVar(&o.pack, "kernel-package", "", "the distribution's package with the kernel of guests (default Debian's 6.12 for virtual machines)")
	f.IntVar(&o.side, "guests", runtime.NumCPU(), "guests side by side")
	f.IntVar(&o.memory, "guest-memory", 3072, "memory of a guest, in MiB")
	f.DurationVar(&o.timeout, "guest-limit", 20*time.Minute, "how long a guest may take for one mode at one number of Services before it is skipped")
}

// doCell is what this program does as a guest's init.
func doCell(ctx context.Context, job []byte, out io.Writer) error {
	var cell scenarios.Cell
	if err := json.Unmarshal(job, &cell); err != nil {
		return fmt.Errorf("read the cell: %w", err)
	}
	return cell.Do(ctx, guest.Provider{}, out)
}

// guests are machines that do cells.
type guests struct {
	machine guest.Machine
	qemu    string
}

var _ scenarios.Guests = guests{}

func (g guests) Run(ctx context.Context, dir string, seed uint64, cell []byte) ([]byte, error) {
	m := g.machine
	m.Seed = seed
	return m.Run(ctx, dir, cell)
}

// prepareGuests gets the kernel and builds what guests boot from.
func prepareGuests(ctx context.Context, o guestOptions, plan scenarios.Plan, report scenarios.Reporter) (g guests, err error) {
	if g.qemu, err = guest.QEMUVersion(ctx); err != nil {
		return g, err
	}
	g.machine = guest.Machine{Memory: o.memory, Limit: o.timeout}
	cache := filepath.Join(plan.Cache, "guest")
	if o.kernel != "" {
		g.machine.Kernel, err = guest.OpenKernel(o.kernel)
	} else {
		g.machine.Kernel, err = guest.FetchKernel(ctx, cache, o.pack, report.Step)
	}
	if err != nil {
		return g, err
	}
	programs := guest.Programs{Plimsoll: plan.Program, KubeProxy: filepath.Join(plan.Bin, "kube-proxy")}
	if programs.Plimsoll == "" {
		if programs.Plimsoll, err = os.Executable(); err != nil {
			return g, err
		}
	}
	g.machine.Initramfs, err = guest.BuildInitramfs(ctx, cache, g.machine.Kernel, programs, report.Step)
	return g, err
}

// count carries a plan out in guests.
func (g guests) count(ctx context.Context, plan scenarios.Plan, o guestOptions, env results.Environment, report scenarios.Reporter) error {
	env.Kernel = g.machine.Kernel.Release
	env.Versions["qemu"] = g.qemu
	return scenarios.Count(ctx, plan, guest.Provider{}, g, o.side, env, report)
}
