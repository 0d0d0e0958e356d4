// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// program is the variable by which this binary, run again as a child, learns what to do.
const program = "PLIMSOLL_TEST_PROGRAM"

func TestMain(m *testing.M) {
	switch os.Getenv(program) {
	case "":
		os.Exit(m.Run())
	case "burn":
		mustBurn(300 * time.Millisecond)
	case "hold":
		held := make([]byte, heldBytes)
		for i := 0; i < len(held); i += os.Getpagesize() {
			held[i] = 1
		}
		fmt.Println("held")
		io.Copy(io.Discard, os.Stdin) // until the pipe closes
		fmt.Println(held[0])
	}
}

// heldBytes is what the child "hold" allocates and touches.
const heldBytes = 64 << 20

// mustBurn uses so much CPU.
func mustBurn(want time.Duration) {
	clock := func() time.Duration {
		used, err := readClock(unix.CLOCK_PROCESS_CPUTIME_ID)
		if err != nil {
			panic(err)
		}
		return used
	}
	for start := clock(); clock()-start < want; {
	}
}

// mustCgroup returns a new cgroup2 folder, gone with the test.
func mustCgroup(tb testing.TB) string {
	tb.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || fields[2] != "cgroup2" {
			continue
		}
		folder, err := os.MkdirTemp(fields[1], "plimsoll-test-")
		if err != nil {
			tb.Skipf("cgroup2 cannot be written: %v", err)
		}
		tb.Cleanup(func() {
			if err := os.Remove(folder); err != nil {
				tb.Error(err)
			}
		})
		return folder
	}
	tb.Skip("no cgroup2 mount")
	return ""
}

// mustChild returns the command of a child in a cgroup2 folder.
func mustChild(tb testing.TB, folder, name string) *exec.Cmd {
	tb.Helper()
	directory, err := os.Open(folder)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { directory.Close() })
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), program+"="+name)
	c.Stderr = os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(directory.Fd())}
	return c
}

func mustRead(tb testing.TB, site Site) Reading {
	tb.Helper()
	r, err := site.Read()
	if errors.Is(err, errors.ErrUnsupported) {
		tb.Skip(err)
	}
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// Children burn a known time in client, server and proxy folders: each field says what wait4(2) says of its child, and all
// of them fit into what the machine was busy for.
func TestCPUIsChargedToWhomUsedIt(t *testing.T) {
	names := []string{"client", "server", "server", "proxy"}
	var folders []string
	for range names {
		folders = append(folders, mustCgroup(t))
	}
	site := Site{Client: folders[0], Servers: folders[1:3], Proxy: folders[3]}
	before := mustRead(t, site)
	used := map[string]time.Duration{}
	for i, name := range names {
		c := mustChild(t, folders[i], "burn")
		if err := c.Run(); err != nil {
			t.Fatal(err)
		}
		used[name] += c.ProcessState.UserTime() + c.ProcessState.SystemTime()
	}
	mustBurn(100 * time.Millisecond)
	cpu := mustRead(t, site).Since(before)
	t.Logf("%+v, other %s (%.1f %%)", cpu, cpu.Other(), 100*cpu.OtherShare())

	const tolerance = 2 * time.Millisecond
	for name, got := range map[string]time.Duration{"client": cpu.Client, "server": cpu.Server, "proxy": cpu.Proxy} {
		if d := got - used[name]; d.Abs() > tolerance {
			t.Errorf("%s used %s, the meter says %s", name, used[name], got)
		}
	}
	if cpu.Harness < 100*time.Millisecond {
		t.Errorf("this process used 100 ms and more, the meter says %s", cpu.Harness)
	}
	if cpu.Kernel < 0 || cpu.Kernel > cpu.Machine {
		t.Errorf("kernel threads used %s of %s", cpu.Kernel, cpu.Machine)
	}
	if cpu.Machine > cpu.Wall*time.Duration(cpu.CPUs)+20*time.Millisecond {
		t.Errorf("%d CPUs were busy for %s in %s", cpu.CPUs, cpu.Machine, cpu.Wall)
	}
	if cpu.Other() < -50*time.Millisecond {
		t.Errorf("the parts are %s more than the machine was busy for, %s", -cpu.Other(), cpu.Machine)
	}
	if share := cpu.OtherShare(); share < 0 || share > 1 {
		t.Errorf("share of everything else is %g", share)
	}
}

func TestCgroupsBelowAFolderCount(t *testing.T) {
	folder := mustCgroup(t)
	below := filepath.Join(folder, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	site := Site{Harness: []string{folder}}
	before := mustRead(t, site)
	if err := mustChild(t, below, "burn").Run(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(below); err != nil {
		t.Fatal(err)
	}
	if cpu := mustRead(t, site).Since(before); cpu.Harness < 300*time.Millisecond {
		t.Errorf("300 ms were used below the folder, the meter says %s", cpu.Harness)
	}
}

func TestOther(t *testing.T) {
	cpu := CPU{Wall: time.Second, CPUs: 2, Machine: 1500 * time.Millisecond, Client: 500 * time.Millisecond, Server: 200 * time.Millisecond,
		Kernel: 100 * time.Millisecond, Interrupts: 100 * time.Millisecond, Proxy: 300 * time.Millisecond, Harness: 100 * time.Millisecond}
	if cpu.Path() != 900*time.Millisecond || cpu.Other() != 200*time.Millisecond || cpu.OtherShare() != 0.1 {
		t.Errorf("path %s, other %s, share %g; want 900ms, 200ms, 0.1", cpu.Path(), cpu.Other(), cpu.OtherShare())
	}
	if share := (CPU{}).OtherShare(); share != 0 {
		t.Errorf("share of an empty interval is %g", share)
	}
}

func TestReadSaysWhichFolderIsMissing(t *testing.T) {
	if _, err := (Site{Client: "/nowhere"}).Read(); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("got %v", err)
	}
}

// Every meter describes itself, reads on this machine, and shows nothing for an interval without length.
func TestMeters(t *testing.T) {
	names := map[string]bool{}
	for _, m := range All {
		t.Run(m.Name(), func(t *testing.T) {
			if m.Name() == "" || m.Doc() == "" || names[m.Name()] {
				t.Errorf("name %q or doc %q is empty or taken", m.Name(), m.Doc())
			}
			names[m.Name()] = true
			var r Reading
			if err := m.read(Site{Client: mustCgroup(t)}, &r); errors.Is(err, errors.ErrUnsupported) {
				t.Skip(err)
			} else if err != nil {
				t.Fatal(err)
			}
			cpu := CPU{CPUs: r.stat.cpus}
			if m.since(&r, &r, &cpu); cpu != (CPU{CPUs: r.stat.cpus}) {
				t.Errorf("an interval without length shows %+v", cpu)
			}
		})
	}
}

// The clocks of sleeping kernel threads show what the scheduler shows.
func TestKernelThreadClocks(t *testing.T) {
	var before, after Reading
	if err := (kernelThreads{}).read(Site{}, &before); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	shown := map[thread]time.Duration{}
	for k := range before.threads {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", k.pid))
		if err != nil {
			continue // it ended, or the kernel has no CONFIG_SCHED_INFO
		}
		var nanoseconds int64
		if _, err := fmt.Sscan(string(content), &nanoseconds); err != nil {
			t.Fatal(err)
		}
		shown[k] = time.Duration(nanoseconds)
	}
	if len(shown) == 0 {
		t.Skip("no /proc/PID/schedstat")
	}
	if err := (kernelThreads{}).read(Site{}, &after); err != nil {
		t.Fatal(err)
	}
	const tick = 10 * time.Millisecond // by which schedstat lags for a thread that runs
	for k, got := range shown {
		last, ok := after.threads[k]
		if ok && (got < before.threads[k]-tick || got > last) {
			t.Errorf("thread %d: schedstat %s is not between %s and %s", k.pid, got, before.threads[k], last)
		}
	}
}

func TestReadMemory(t *testing.T) {
	folder := mustCgroup(t)
	if m, err := ReadMemory(folder); err != nil || m != (Memory{}) {
		t.Errorf("empty folder: %+v, %v", m, err)
	}
	below := filepath.Join(folder, "below")
	if err := os.Mkdir(below, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(below)
	c := mustChild(t, below, "hold")
	stdin, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "held\n" {
		t.Errorf("child says %q, %v", line, err)
	}
	m, err := ReadMemory(folder)
	if err != nil || m.Processes != 1 {
		t.Errorf("one child: %+v, %v", m, err)
	}
	if m.Anonymous < heldBytes || m.PSS < m.Anonymous || m.RSS < m.PSS || m.RSS > 4*heldBytes {
		t.Errorf("a child holds %d bytes, the meter says %+v", heldBytes, m)
	}
	stdin.Close()
	if err := c.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := ReadMemory("/nowhere"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing folder: %v", err)
	}
}
