// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/lab/labtest"
)

// testPlan is a lab with the programs of the folder bin, whose pods run cat.
func testPlan(t *testing.T, name, bin string, sites ...clusters.ProxySpec) clusters.Plan {
	t.Helper()
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Fatal(err)
	}
	return clusters.Plan{Name: fmt.Sprintf("test-%s-%d", name, os.Getpid()), Dir: t.TempDir(), Bin: bin, Program: cat, Sites: sites}
}

// mustCreate opens a lab and closes it with the test.
func mustCreate(t *testing.T, plan clusters.Plan) *lab {
	t.Helper()
	c, err := Provider{}.Create(t.Context(), plan)
	if err != nil {
		t.Fatal(err)
	}
	l := c[0].(*lab)
	t.Cleanup(func() {
		if err := l.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return l
}

func TestPodsReachEachOtherAndNothingElse(t *testing.T) {
	l := mustCreate(t, testPlan(t, "pods", labtest.Bin(t, testBin), clusters.ProxySpec{Name: "direct"}, clusters.ProxySpec{Name: "hooks", ConntrackHooks: true}))
	// The last address of each range, or almost: a pod answers on all of it.
	lasts := [][]string{{"198.18.127.254", "2001:2:0:40:ffff:ffff:ffff:ffff"}, {"198.18.191.254", "2001:2:0:80:ffff:ffff:ffff:ffff"}}
	for _, n := range l.nodes {
		for i, b := range n.backends {
			for j, f := range families() {
				for _, a := range []string{b.addresses[j].String(), lasts[i][j]} {
					addr := net.JoinHostPort(a, "8080")
					listener, err := b.ns.Listen(t.Context(), addr)
					if err != nil {
						t.Fatalf("%s: listen on %s: %v", n.spec.Name, addr, err)
					}
					conn, err := n.client.ns.DialContext(t.Context(), "tcp", addr)
					if err != nil {
						t.Fatalf("%s: client to %s: %v", n.spec.Name, addr, err)
					}
					if got := conn.LocalAddr().(*net.TCPAddr).IP.String(); got != f.client.String() {
						t.Errorf("%s: the client's address is %s, want %s", n.spec.Name, got, f.client)
					}
					conn.Close()
					listener.Close()
				}
			}
		}
		for _, beyond := range []string{"192.0.2.1:80", "[2001:db8::1]:80"} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if conn, err := n.client.ns.DialContext(ctx, "tcp", beyond); err == nil {
				conn.Close()
				t.Errorf("%s: a pod reached %s, outside the lab", n.spec.Name, beyond)
			}
			cancel()
		}
	}
}

func TestProcessesRunInsideTheirPod(t *testing.T) {
	l := mustCreate(t, testPlan(t, "exec", labtest.Bin(t, testBin), clusters.ProxySpec{Name: "direct"}))
	n := l.nodes[0]
	p, err := n.client.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(p.Stdin(), "hello\n"); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(p.Stdout()).ReadString('\n')
	if err != nil || line != "hello\n" {
		t.Fatalf("the process answered %q, %v", line, err)
	}
	pid := p.(*host.Process).PID()
	group, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	if want := "/node-direct/pod-client\n"; !strings.HasSuffix(string(group), want) {
		t.Errorf("cgroup is %q, want one that ends with %q", group, want)
	}
	if err := n.Freeze(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if err := n.Freeze(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the process lives on after Close: %v", err)
	}
}

func TestKubeProxyIsReal(t *testing.T) {
	needNFT(t)
	l := mustCreate(t, testPlan(t, "proxy", labtest.Bin(t, testBin), clusters.ProxySpec{Name: "nftables", KubeProxy: "nftables"}))
	n := l.nodes[0]
	client := http.Client{Transport: &http.Transport{DialContext: n.DialContext}}
	ctx, cancel := context.WithTimeout(t.Context(), serveLimit)
	defer cancel()
	var mode []byte
	// Its metrics are served a moment after its health.
	if err := host.Poll(ctx, "kube-proxy to say its mode", func() (bool, error) {
		resp, err := client.Get("http://127.0.0.1:10249/proxyMode")
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		mode, err = io.ReadAll(resp.Body)
		return err == nil, err
	}); err != nil {
		t.Fatal(err)
	}
	if string(mode) != "nftables" {
		t.Errorf("kube-proxy says mode %q", mode)
	}
	// A proxy that dies is told with the end of its log, and is not the lab's end.
	if err := syscall.Kill(n.proxy.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-n.proxy.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("nobody noticed that kube-proxy died")
	}
	if err := n.Err(); err == nil || !strings.Contains(err.Error(), "kube-proxy") || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the error does not say what died and how: %v", err)
	}
	if err := l.Err(); err != nil {
		t.Errorf("the lab took the end of a proxy for its own: %v", err)
	}
}
