// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
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
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/results"
	"github.com/plimsoll-bench/plimsoll/scenarios"
)

// guestOptions are the flags of guests.
type guestOptions struct {
	program   string
	kernel    string
	pack      string
	arguments string
	side      int
	memory    int
	timeout   time.Duration
}

func (o *guestOptions) bind(f *pflag.FlagSet) {
	f.StringVar(&o.program, "program", "", "plimsoll that guests run, statically linked (default this one)")
	f.StringVar(&o.kernel, "kernel", "", "bzImage of guests, with its modules in lib/modules beside its folder")
	f.StringVar(&o.pack, "kernel-package", "", "the distribution's package with the kernel of guests, or several, with commas between them (default Debian's 6.12 for virtual machines)")
	f.StringVar(&o.arguments, "kernel-arguments", "", "more of the command line of guests' kernel, such as ipv6.disable=1")
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
	missing error // why there are none
}

var _ scenarios.Guests = guests{}

func (g guests) Run(ctx context.Context, dir string, seed uint64, cell []byte) ([]byte, error) {
	if g.missing != nil {
		return nil, g.missing
	}
	m := g.machine
	m.Seed = seed
	return m.Run(ctx, dir, cell)
}

// prepareGuests gets the kernel and builds what guests boot from. An error that wraps clusters.ErrNotSupported is that of all their cells, too.
func prepareGuests(ctx context.Context, o guestOptions, plan scenarios.Plan, report scenarios.Reporter) (g guests, err error) {
	defer func() { g.missing = err }()
	if g.qemu, err = guest.QEMUVersion(ctx); err != nil {
		return g, err
	}
	g.machine = guest.Machine{Memory: o.memory, Limit: o.timeout, Arguments: o.arguments}
	cache := filepath.Join(plan.Cache, "guest")
	if o.kernel != "" {
		g.machine.Kernel, err = guest.OpenKernel(o.kernel)
	} else {
		g.machine.Kernel, err = guest.FetchKernel(ctx, cache, o.pack, report.Step)
	}
	if err != nil && o.kernel+o.pack != "" {
		return g, fmt.Errorf("%v", err) // one that was asked for is no kernel that cannot be had
	}
	if err != nil {
		return g, err
	}
	programs := guest.Programs{Plimsoll: o.program, KubeProxy: filepath.Join(plan.Bin, "kube-proxy")}
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
	env.Kernel = cmp.Or(g.machine.Kernel.Release, "unknown")
	env.Versions["qemu"] = g.qemu
	return scenarios.Count(ctx, plan, guest.Provider{}, g, o.side, env, report)
}

// examineGuests looks for QEMU and the kernel of guests. Without them a run skips these.
func examineGuests(ctx context.Context) finding {
	f := finding{what: "guests", state: note}
	version, err := guest.QEMUVersion(ctx)
	if err != nil {
		f.detail = err.Error()
		return f
	}
	f.state, f.detail = has, version
	if cache, err := host.CacheDir(); err == nil {
		if kernel, err := guest.KeptKernel(filepath.Join(cache, "guest")); err == nil {
			f.detail += ", kernel " + kernel.Release
		} else {
			f.detail += "; the first run downloads their kernel"
		}
	}
	return f
}
