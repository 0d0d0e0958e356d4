// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/guest"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// TestMain is the guests' init, too, for which the tests' own program is the guests'.
func TestMain(m *testing.M) {
	if guest.IsInit() {
		guest.Init(func(_ context.Context, job []byte, out io.Writer) error { return jobs[string(job)](out) })
	}
	os.Exit(m.Run())
}

// jobs are what guests do in tests.
var jobs = map[string]func(out io.Writer) error{
	"count": func(out io.Writer) error {
		// Nothing but the processor makes the clock go on.
		start := time.Now()
		sum := 0
		for i := range 1_000_000 {
			sum += i
		}
		_, err := fmt.Fprintln(out, sum, time.Since(start).Nanoseconds())
		return err
	},
	"modules": func(out io.Writer) error {
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "one"}, PeerName: "two"}); err != nil {
			return err
		}
		for _, argv := range [][]string{{"modprobe", "ip_vs"}, {"xtables-nft-multi", "iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE"}, {"ipset", "create", "all", "hash:ip,port"}} {
			if said, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil {
				return fmt.Errorf("%v: %w: %s", argv, err, said)
			}
		}
		b, err := os.ReadFile("/proc/modules")
		if err != nil {
			return err
		}
		_, err = out.Write(b)
		return err
	},
	"fail": func(io.Writer) error { return errors.New("no luck") },
	"hang": func(io.Writer) error {
		for {
			time.Sleep(time.Hour) // which the guest's clock leaps over
		}
	},
	"panic": func(io.Writer) error { return os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0) },
	"exhaust": func(io.Writer) error {
		for {
			b, err := unix.Mmap(-1, 0, 64<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE)
			if err != nil {
				return err
			}
			b[0] = 1
		}
	},
}

func newMachine(t *testing.T) guest.Machine {
	t.Helper()
	cache, err := host.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	said := func(what string) { t.Log(what) }
	if _, err := guest.QEMUVersion(t.Context()); errors.Is(err, clusters.ErrNotSupported) {
		t.Skipf("skipped: %v", err)
	}
	kernel, err := guest.FetchKernel(t.Context(), filepath.Join(cache, "guest"), "", said)
	if errors.Is(err, clusters.ErrNotSupported) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	me, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	initramfs, err := guest.BuildInitramfs(t.Context(), t.TempDir(), kernel, guest.Programs{Plimsoll: me}, said)
	if err != nil {
		t.Fatal(err)
	}
	return guest.Machine{Kernel: kernel, Initramfs: initramfs, Memory: 512, Seed: 1, Limit: 2 * time.Minute}
}

// What a job writes comes out. The same seed gives the same again, and a million steps of a loop are some millions of instructions.
func TestRun(t *testing.T) {
	m := newMachine(t)
	var first string
	for range 2 {
		out, err := m.Run(t.Context(), t.TempDir(), []byte("count"))
		if err != nil {
			t.Fatal(err)
		}
		if first == "" {
			first = string(out)
		}
		if string(out) != first {
			t.Errorf("%q, and then %q", first, out)
		}
	}
	var sum, instructions int
	if _, err := fmt.Sscan(first, &sum, &instructions); err != nil || sum != 499_999_500_000 || instructions < 1_000_000 || instructions > 20_000_000 {
		t.Errorf("%q: %v", first, err)
	}
}

// Modules of the package's kernel are found by what asks for them.
func TestModulesLoad(t *testing.T) {
	out, err := newMachine(t).Run(t.Context(), t.TempDir(), []byte("modules"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"veth", "ip_vs", "nf_nat"} {
		if !strings.Contains(string(out), name+" ") {
			t.Errorf("%s is not loaded: %s", name, out)
		}
	}
}

// Whatever ends a guest is in the error.
func TestRunFails(t *testing.T) {
	m := newMachine(t)
	for job, want := range map[string]string{"fail": "no luck", "panic": "sysrq triggered crash", "exhaust": "deadlocked on memory"} {
		t.Run(job, func(t *testing.T) {
			if _, err := m.Run(t.Context(), t.TempDir(), []byte(job)); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("want %q, got %v", want, err)
			}
		})
	}
	m.Limit = 20 * time.Second
	if _, err := m.Run(t.Context(), t.TempDir(), []byte("hang")); err == nil || !strings.Contains(err.Error(), "not done within 20s") {
		t.Errorf("want its end, got %v", err)
	}
}
