// SPDX-License-Identifier: Apache-2.0

// Package lbtest runs pods for tests: processes in a network namespace and a cgroup of their own, that listen and connect
// as they are told.
package lbtest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// podVariable, when set, makes a test binary a pod.
const podVariable = "PLIMSOLL_LBTEST_POD"

// Main runs the tests of a package that starts pods, or a pod. It stands alone in TestMain.
func Main(m *testing.M) {
	if os.Getenv(podVariable) != "" {
		if err := servePod(); err != nil {
			fmt.Fprintln(os.Stderr, "pod:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// A Pod is a process that a test gives orders to. Its network namespace has a loopback interface that is up and no way
// out; 127.0.0.0/8 and the addresses of AddAddress are its own.
type Pod struct {
	Cgroup string // its cgroup2 folder
	pid    int
	orders *rpc.Client
}

// StartPod starts a pod that ends with the test. It skips the test where there is no root or no cgroup2.
func StartPod(tb testing.TB) *Pod {
	tb.Helper()
	cgroup := NewCgroup(tb)
	folder, err := os.Open(cgroup)
	if err != nil {
		tb.Fatal(err)
	}
	defer folder.Close()

	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), podVariable+"=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, UseCgroupFD: true, CgroupFD: int(folder.Fd())}
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatalf("start a pod: %v", err)
	}
	orders := rpc.NewClient(pipes{out, in})
	// The pod ends when its standard input does, also if this process is killed.
	tb.Cleanup(func() {
		if err := orders.Close(); err != nil {
			tb.Errorf("close the pod's input: %v", err)
		}
		if err := cmd.Wait(); err != nil {
			tb.Errorf("pod: %v", err)
		}
	})
	pod := &Pod{Cgroup: cgroup, pid: cmd.Process.Pid, orders: orders}
	pod.do(tb, "Up", struct{}{}, nil)
	return pod
}

// MoveTo puts the pod's process into a cgroup that outlives it. Sockets that it has stay where they were made.
func (p *Pod) MoveTo(tb testing.TB, cgroup string) {
	tb.Helper()
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(p.pid)), 0); err != nil {
		tb.Fatal(err)
	}
	p.Cgroup = cgroup
}

var cgroups atomic.Int64

// NewCgroup makes a cgroup2 folder that is removed after the test.
func NewCgroup(tb testing.TB) string {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("skipped: needs root")
	}
	root, err := Cgroup2Mount()
	if err != nil {
		tb.Skipf("skipped: %v", err)
	}
	cgroup := filepath.Join(root, fmt.Sprintf("plimsoll-test-%d-%d", os.Getpid(), cgroups.Add(1)))
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		tb.Skipf("skipped: %v", err)
	}
	tb.Cleanup(func() {
		if err := os.Remove(cgroup); err != nil {
			tb.Error(err)
		}
	})
	return cgroup
}

// Attached lists the programs on the connect4 hook of a cgroup.
func Attached(tb testing.TB, cgroup string) []link.AttachedProgram {
	tb.Helper()
	folder, err := os.Open(cgroup)
	if err != nil {
		tb.Fatal(err)
	}
	defer folder.Close()
	found, err := link.QueryPrograms(link.QueryOptions{Target: int(folder.Fd()), Attach: ebpf.AttachCGroupInet4Connect})
	if err != nil {
		tb.Fatal(err)
	}
	return found.Programs
}

// Cgroup2Mount finds where cgroup2 is mounted.
func Cgroup2Mount() (string, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		// proc_pid_mountinfo(5): the fifth field is the mount point, the first after " - " the type.
		before, after, _ := strings.Cut(lines.Text(), " - ")
		if fields := strings.Fields(before); len(fields) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", errors.New("no cgroup2 is mounted")
}

// MountBPF mounts a bpffs in a mount namespace of its own that ends with the test, whose goroutine it binds to a thread.
// The path that it returns leads there from every thread of this process.
func MountBPF(tb testing.TB) string {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("skipped: needs root")
	}
	folder := tb.TempDir()
	runtime.LockOSThread() // never unlocked: a thread with a namespace of its own ends with its goroutine
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		tb.Skipf("skipped: mount namespace: %v", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		tb.Fatalf("make mounts private: %v", err)
	}
	if err := unix.Mount("bpf", folder, "bpf", 0, ""); err != nil {
		tb.Skipf("skipped: bpffs: %v", err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(folder, unix.MNT_DETACH); err != nil {
			tb.Error(err)
		}
	})
	return fmt.Sprintf("/proc/self/task/%d/root%s", unix.Gettid(), folder)
}

// TimedOut is the error of what was not answered.
const TimedOut = "timed out"

// Outcome counts what came of connects and exchanges: by what the server answered, by its address as the client sees it
// (getpeername(2), or where an answer to an unconnected socket is from), by the client's address as the server sees it, and errors by
// their text.
type Outcome struct {
	Answers map[string]int
	Peers   map[string]int
	Clients map[string]int
	Errors  map[string]int
}

// AddAddress gives the pod's loopback interface an address in CIDR form.
func (p *Pod) AddAddress(tb testing.TB, cidr string) {
	tb.Helper()
	p.do(tb, "AddAddress", cidr, nil)
}

// Listen serves network ("tcp", "udp" or "sctp", of which there is only the beginning) at address until the test ends. Who connects, and for UDP sends, is answered
// with the address and with its own.
func (p *Pod) Listen(tb testing.TB, network, address string) {
	tb.Helper()
	p.do(tb, "Listen", Target{Network: network, Address: address}, nil)
}

// Connect connects to address n times, one after the other, and reads the answers. On the networks "tcp6" and "udp6" an IPv4
// address is connected to from an IPv6 socket.
func (p *Pod) Connect(tb testing.TB, network, address string, n int) Outcome {
	tb.Helper()
	var outcome Outcome
	p.do(tb, "Connect", Target{Network: network, Address: address, N: n}, &outcome)
	return outcome
}

// ConnectBriefly connects to address once, and awaits an answer for no longer than one that comes at all would take.
func (p *Pod) ConnectBriefly(tb testing.TB, network, address string) Outcome {
	tb.Helper()
	var outcome Outcome
	p.do(tb, "Connect", Target{Network: network, Address: address, N: 1, Patience: briefly}, &outcome)
	return outcome
}

// ConnectFrom connects to the addresses from one address and port, one after the other, and reads the answers while all are connected.
func (p *Pod) ConnectFrom(tb testing.TB, network, host string, port int, addresses ...string) Outcome {
	tb.Helper()
	var outcome Outcome
	p.do(tb, "ConnectFrom", Origin{Network: network, Host: host, Port: port, Addresses: addresses}, &outcome)
	return outcome
}

// Keep connects a UDP socket to address, which AskKept asks on, in place of the one before.
func (p *Pod) Keep(tb testing.TB, network, address string) {
	tb.Helper()
	p.do(tb, "Keep", Target{Network: network, Address: address}, nil)
}

// AskKept asks once on the socket of Keep.
func (p *Pod) AskKept(tb testing.TB) Outcome {
	tb.Helper()
	var outcome Outcome
	p.do(tb, "AskKept", struct{}{}, &outcome)
	return outcome
}

// Hold connects n more TCP sockets to address, which stay connected until LetGo. They are not asked.
func (p *Pod) Hold(tb testing.TB, network, address string, n int) {
	tb.Helper()
	p.do(tb, "Hold", Target{Network: network, Address: address, N: n}, nil)
}

// Reconnect ends the connections of the held sockets and connects the same ones to address, an IPv4 one.
func (p *Pod) Reconnect(tb testing.TB, address string) {
	tb.Helper()
	p.do(tb, "Reconnect", address, nil)
}

// HeldPeers counts what getpeername(2) says on the held sockets.
func (p *Pod) HeldPeers(tb testing.TB) map[string]int {
	tb.Helper()
	peers := map[string]int{}
	p.do(tb, "HeldPeers", struct{}{}, &peers)
	return peers
}

// LetGo closes the held sockets.
func (p *Pod) LetGo(tb testing.TB) {
	tb.Helper()
	p.do(tb, "LetGo", struct{}{}, nil)
}

// Open opens the unconnected UDP socket that Exchange sends from, in place of the one before. On the network "udp6" it is a
// socket of IPv6, which also talks to addresses of IPv4.
func (p *Pod) Open(tb testing.TB, network string) {
	tb.Helper()
	p.do(tb, "Open", network, nil)
}

// Exchange sends to address n times, one after the other, and awaits an answer to each.
func (p *Pod) Exchange(tb testing.TB, address string, n int) Outcome {
	tb.Helper()
	var outcome Outcome
	p.do(tb, "Exchange", Target{Address: address, N: n}, &outcome)
	return outcome
}

// SendBriefly sends so many bytes to address once, from the socket of Open, and awaits an answer for no longer than one that comes at all
// would take.
func (p *Pod) SendBriefly(tb testing.TB, address string, size int) Outcome {
	tb.Helper()
	var outcome Outcome
	p.do(tb, "Exchange", Target{Address: address, N: 1, Size: size, Patience: briefly}, &outcome)
	return outcome
}

// Hammer connects to address without a pause until stop is called, which tells what came of it. It returns when the first
// connect is over.
func (p *Pod) Hammer(tb testing.TB, network, address string) (stop func() Outcome) {
	tb.Helper()
	p.do(tb, "StartHammer", Target{Network: network, Address: address}, nil)
	return func() Outcome {
		tb.Helper()
		var outcome Outcome
		p.do(tb, "StopHammer", struct{}{}, &outcome)
		return outcome
	}
}

// Sink listens at address and drops what comes, every 5 ms, so that a connect wakes nobody.
func (p *Pod) Sink(tb testing.TB, address string) {
	tb.Helper()
	p.do(tb, "Sink", address, nil)
}

// ConnectTimes times n raw connect(2) calls to addresses in turn, in nanoseconds; each socket is closed by RST.
func (p *Pod) ConnectTimes(tb testing.TB, n int, addresses []string) []int64 {
	tb.Helper()
	return p.times(tb, Timing{N: n, Addresses: addresses})
}

// SocketTimes is the same from socket(2) to the end of close(2).
func (p *Pod) SocketTimes(tb testing.TB, n int, addresses []string) []int64 {
	tb.Helper()
	return p.times(tb, Timing{N: n, Addresses: addresses, Whole: true})
}

func (p *Pod) times(tb testing.TB, t Timing) (times []int64) {
	tb.Helper()
	p.do(tb, "ConnectTimes", t, &times)
	return times
}

func (p *Pod) do(tb testing.TB, order string, argument, reply any) {
	tb.Helper()
	if reply == nil {
		reply = &struct{}{}
	}
	if err := p.orders.Call("Orders."+order, argument, reply); err != nil {
		tb.Fatalf("pod: %s: %v", order, err)
	}
}

// pipes makes one stream of two.
type pipes struct {
	io.ReadCloser
	out io.WriteCloser
}

func (p pipes) Write(b []byte) (int, error) { return p.out.Write(b) }
func (p pipes) Close() error                { return errors.Join(p.out.Close(), p.ReadCloser.Close()) }
