// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// program is the variable by which this binary, run again as a child, learns that it is a client or a server.
const program = "PLIMSOLL_TEST_PROGRAM"

func TestMain(m *testing.M) {
	switch name := os.Getenv(program); name {
	case "":
		os.Exit(m.Run())
	case "client":
		exit(Client(context.Background(), os.Stdin, os.Stdout))
	default:
		var options ServeOptions
		if err := json.Unmarshal([]byte(name), &options); err != nil {
			exit(err)
		}
		exit(Serve(context.Background(), options, os.Stdin, os.Stdout))
	}
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// pods are two network namespaces with a veth pair between them, gone with the test.
type pods struct {
	client, server netns.NsHandle
}

var (
	clientIP    = netip.MustParseAddr("198.18.255.1")
	serverIP    = netip.MustParseAddr("198.18.255.2")
	blackHoleIP = netip.MustParseAddr("198.18.255.3") // frames to it carry a MAC that nobody has
)

func mustPods(tb testing.TB) pods {
	tb.Helper()
	p := pods{client: mustNamespace(tb), server: mustNamespace(tb)}
	client, err := netlink.NewHandleAt(p.client)
	if err != nil {
		tb.Fatal(err)
	}
	defer client.Close()
	server, err := netlink.NewHandleAt(p.server)
	if err != nil {
		tb.Fatal(err)
	}
	defer server.Close()
	pair := &netlink.Veth{LinkAttrs: netlink.NewLinkAttrs(), PeerName: "eth0", PeerNamespace: netlink.NsFd(p.server)}
	pair.Name = "eth0"
	if err := client.LinkAdd(pair); errors.Is(err, unix.EOPNOTSUPP) {
		tb.Skip("this kernel has no veth")
	} else if err != nil {
		tb.Fatal(err)
	}
	mustAddress(tb, client, clientIP)
	mustAddress(tb, server, serverIP)
	link, err := client.LinkByName("eth0")
	if err != nil {
		tb.Fatal(err)
	}
	if err := client.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: blackHoleIP.AsSlice(),
		HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 99}}); err != nil {
		tb.Fatal(err)
	}
	return p
}

// mustNamespace returns a new network namespace.
func mustNamespace(tb testing.TB) netns.NsHandle {
	tb.Helper()
	var made netns.NsHandle
	err := inNamespace(netns.None(), func() (err error) {
		made, err = netns.New()
		return err
	})
	if errors.Is(err, unix.EPERM) {
		tb.Skip("network namespaces need CAP_SYS_ADMIN")
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { made.Close() })
	return made
}

// inNamespace calls f on a thread of its own, in ns unless that is none. The thread ends with the call.
func inNamespace(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if ns.IsOpen() {
			if err := netns.Set(ns); err != nil {
				done <- err
				return
			}
		}
		done <- f()
	}()
	return <-done
}

func mustAddress(tb testing.TB, handle *netlink.Handle, ip netip.Addr) {
	tb.Helper()
	for _, name := range []string{"lo", "eth0"} {
		link, err := handle.LinkByName(name)
		if err != nil {
			tb.Fatal(err)
		}
		if name == "eth0" {
			address := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(24, 32)}}
			if err := handle.AddrAdd(link, address); err != nil {
				tb.Fatal(err)
			}
		}
		if err := handle.LinkSetUp(link); err != nil {
			tb.Fatal(err)
		}
	}
}

// mustRoute sends what goes to an address by way of a neighbour.
func mustRoute(tb testing.TB, ns netns.NsHandle, to, by netip.Addr) {
	tb.Helper()
	handle, err := netlink.NewHandleAt(ns)
	if err != nil {
		tb.Fatal(err)
	}
	defer handle.Close()
	if err := handle.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}, Gw: by.AsSlice()}); err != nil {
		tb.Fatal(err)
	}
}

// child is a client or a server that runs in a namespace.
type child struct {
	*exec.Cmd
	ended chan struct{} // closed when it has, whereupon err says how
	err   error
}

// mustStart runs this binary as the named program and returns it with its pipes.
func mustStart[T interface{ Close() error }](tb testing.TB, ns netns.NsHandle, name string, talk func(*child) (T, error)) (T, *child) {
	tb.Helper()
	c := &child{Cmd: exec.Command("/proc/self/exe"), ended: make(chan struct{})}
	c.Env = append(os.Environ(), program+"="+name)
	c.Stderr = os.Stderr
	talker, err := talk(c)
	if err != nil {
		tb.Fatal(err)
	}
	if err := inNamespace(ns, c.Start); err != nil {
		tb.Fatal(err)
	}
	go func() {
		defer close(c.ended)
		state, err := c.Process.Wait() // not Cmd.Wait, which would close the pipe that is still read
		if err == nil && !state.Success() {
			err = errors.New(state.String())
		}
		c.err = err
	}()
	tb.Cleanup(func() {
		talker.Close()
		c.mustEnd(tb)
	})
	return talker, c
}

// mustEnd waits until the child has ended by itself, without an error.
func (c *child) mustEnd(tb testing.TB) {
	tb.Helper()
	select {
	case <-c.ended:
	case <-time.After(10 * time.Second):
		c.Process.Kill()
		<-c.ended
		tb.Errorf("%s did not end when its pipes closed", c.Path)
	}
	if c.err != nil {
		tb.Errorf("child: %v", c.err)
	}
}

func mustClient(tb testing.TB, ns netns.NsHandle) (*Driver, *child) {
	tb.Helper()
	return mustStart(tb, ns, "client", func(c *child) (*Driver, error) {
		stdin, err := c.StdinPipe()
		if err != nil {
			return nil, err
		}
		stdout, err := c.StdoutPipe()
		return NewDriver(stdin, stdout), err
	})
}

func mustServer(tb testing.TB, ns netns.NsHandle, options ServeOptions) (*Server, Report, *child) {
	tb.Helper()
	encoded, err := json.Marshal(options)
	if err != nil {
		tb.Fatal(err)
	}
	server, c := mustStart(tb, ns, string(encoded), func(c *child) (*Server, error) {
		stdin, err := c.StdinPipe()
		if err != nil {
			return nil, err
		}
		stdout, err := c.StdoutPipe()
		return NewServer(stdin, stdout), err
	})
	report, err := server.Ready(tb.Context())
	if err != nil {
		tb.Fatal(err)
	}
	return server, report, c
}

// mustDo has a client carry out a request.
func mustDo(tb testing.TB, d *Driver, request Request) Reply {
	tb.Helper()
	reply, err := d.Do(tb.Context(), request)
	if err != nil {
		tb.Fatal(err)
	}
	return reply
}

// timeWait returns the number of TIME_WAIT sockets in the namespace of a child.
func timeWait(tb testing.TB, c *child) (n int) {
	tb.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/sockstat", c.Process.Pid))
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		if _, after, ok := strings.Cut(line, " tw "); ok {
			if _, err := fmt.Sscan(after, &n); err != nil {
				tb.Fatal(err)
			}
			return n
		}
	}
	tb.Fatalf("no tw in %q", content)
	return 0
}
