// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/lab/labtest"
)

// serveLimit is how long a proxy may take to carry a new Service.
const serveLimit = 20 * time.Second

func needNFT(tb testing.TB) {
	tb.Helper()
	if _, err := exec.LookPath("nft"); err != nil {
		tb.Skip("needs nft")
	}
}

// binWith is a folder with the programs of bin whose kube-proxy is a shell script; the script finds the real one in $real.
func binWith(tb testing.TB, bin, script string) string {
	tb.Helper()
	dir := tb.TempDir()
	for _, program := range []string{"etcd", "kube-apiserver"} {
		if err := os.Symlink(filepath.Join(bin, program), filepath.Join(dir, program)); err != nil {
			tb.Fatal(err)
		}
	}
	script = fmt.Sprintf("#!/bin/sh\nreal='%s'\n%s\n", filepath.Join(bin, "kube-proxy"), script)
	if err := os.WriteFile(filepath.Join(dir, "kube-proxy"), []byte(script), 0o755); err != nil {
		tb.Fatal(err)
	}
	return dir
}

// mustListen makes the node's first backend accept connections until the test ends and returns its address.
func mustListen(t *testing.T, n *node) string {
	t.Helper()
	b := n.backends[0]
	listener, err := b.ns.Listen(t.Context(), net.JoinHostPort(b.Address().String(), "8080"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	return listener.Addr().String()
}

// mustServe makes a Service with the node's first backend behind it, which listens, and returns its address once the node's
// client has reached the backend there.
func mustServe(t *testing.T, l *lab, n *node, name string) string {
	t.Helper()
	client, err := kubernetes.NewForConfig(l.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	port, number, protocol, ready := "http", int32(8080), corev1.ProtocolTCP, true
	service, err := client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: port, Port: 80, Protocol: protocol}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.DiscoveryV1().EndpointSlices("default").Create(t.Context(), &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{n.backends[0].Address().String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}}},
		Ports:       []discoveryv1.EndpointPort{{Name: &port, Port: &number, Protocol: &protocol}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort(service.Spec.ClusterIP, "80")
	ctx, cancel := context.WithTimeout(t.Context(), serveLimit)
	defer cancel()
	if err := host.Poll(ctx, "Service "+name+" to answer on node "+n.spec.Name, func() (bool, error) {
		err := connect(ctx, n, address)
		return err == nil, err
	}); err != nil {
		t.Fatal(err)
	}
	return address
}

// connect opens a connection from the node's client pod and closes it.
func connect(ctx context.Context, n *node, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	conn, err := n.client.ns.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// mustBeGone fails the test when a run of that name has left something.
func mustBeGone(t *testing.T, name string) {
	t.Helper()
	root, err := clusters.Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{root, host.StateDir, host.MemoryDir} {
		left, err := filepath.Glob(filepath.Join(dir, "*"+name+"*"))
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
}

func TestProxyThatCannotStart(t *testing.T) {
	needNFT(t)
	bin := binWith(t, labtest.Bin(t, testBin), `case "$*" in */broken/*) echo no tables today >&2; exit 1;; esac; exec "$real" "$@"`)
	l := mustCreate(t, testPlan(t, "broken", bin,
		clusters.ProxySpec{Name: "broken", KubeProxy: "nftables"}, clusters.ProxySpec{Name: "sound", KubeProxy: "nftables"}))
	broken, sound := l.nodes[0], l.nodes[1]
	err := broken.Err()
	for _, part := range []string{"kube-proxy", "exit status 1", "no tables today"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("Err = %v, want one with %q", err, part)
		}
	}
	if err := broken.Stop(t.Context()); err != nil {
		t.Errorf("Stop of a proxy that is gone: %v", err)
	}
	if again := broken.Err(); again == nil || again.Error() != err.Error() {
		t.Errorf("Err after Stop = %v, want what it was: %v", again, err)
	}
	if err := errors.Join(sound.Err(), l.Err()); err != nil {
		t.Errorf("one broken proxy is told of more than its own site: %v", err)
	}
	mustListen(t, sound)
	mustServe(t, l, sound, "sound")
}

func TestCreateEndsWithItsContext(t *testing.T) {
	// A proxy that runs and is never healthy.
	bin := binWith(t, labtest.Bin(t, testBin), "exec sleep 600")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	plan := testPlan(t, "interrupt", bin, clusters.ProxySpec{Name: "idle", KubeProxy: "nftables"})
	plan.Progress = func(what string) {
		if strings.Contains(what, "proxies") {
			cancel()
		}
	}
	start := time.Now()
	c, err := Provider{}.Create(ctx, plan)
	if c != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("Create = %v, %v; want the interrupt", c, err)
	}
	if took := time.Since(start); took > healthyLimit/2 {
		t.Errorf("an interrupt took %v", took)
	}
	mustBeGone(t, plan.Name)
}

func TestStopEndsTheProxyAlone(t *testing.T) {
	needNFT(t)
	l := mustCreate(t, testPlan(t, "stop", labtest.Bin(t, testBin),
		clusters.ProxySpec{Name: "direct"}, clusters.ProxySpec{Name: "running", KubeProxy: "nftables"}, clusters.ProxySpec{Name: "frozen", KubeProxy: "nftables"}))
	if err := l.nodes[0].Stop(t.Context()); err != nil {
		t.Errorf("Stop without a proxy: %v", err)
	}
	if err := l.nodes[2].Freeze(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	mustListen(t, l.nodes[1])
	address := mustServe(t, l, l.nodes[1], "stays")
	for _, n := range l.nodes[1:] {
		for range 2 {
			if err := n.Stop(t.Context()); err != nil {
				t.Fatalf("%s: %v", n.spec.Name, err)
			}
		}
		select {
		case <-n.proxy.Done():
		default:
			t.Errorf("%s: kube-proxy runs on after Stop", n.spec.Name)
		}
		if procs, err := os.ReadFile(filepath.Join(n.ProxyCgroup(), "cgroup.procs")); err != nil || len(procs) > 0 {
			t.Errorf("%s: processes after Stop: %q, %v", n.spec.Name, procs, err)
		}
		if err := n.Err(); err != nil {
			t.Errorf("%s: a proxy that was stopped is taken for one that failed: %v", n.spec.Name, err)
		}
	}
	select {
	case <-l.Failed():
		t.Errorf("the lab takes Stop for a failure: %v", l.Err())
	default:
	}
	if err := connect(t.Context(), l.nodes[1], address); err != nil {
		t.Errorf("what kube-proxy programmed went with it: %v", err)
	}
	// The pods freeze and go on as before.
	for _, n := range l.nodes[1:] {
		if err := n.Freeze(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		p, err := n.client.Start(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, frozen := range []bool{true, false} {
			if err := n.Freeze(t.Context(), frozen); err != nil {
				t.Errorf("%s: Freeze(%v) after Stop: %v", n.spec.Name, frozen, err)
			}
		}
		if err := p.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestLabsSideBySide(t *testing.T) {
	needNFT(t)
	bin := labtest.Bin(t, testBin)
	var plans [2]clusters.Plan
	var labs [2]*lab
	var g errgroup.Group
	for i := range labs {
		plans[i] = testPlan(t, fmt.Sprintf("side-%d", i), bin, clusters.ProxySpec{Name: "direct"}, clusters.ProxySpec{Name: "nftables", KubeProxy: "nftables"})
		g.Go(func() error {
			c, err := Provider{}.Create(t.Context(), plans[i])
			if err == nil {
				labs[i] = c[0].(*lab)
			}
			return err
		})
	}
	err := g.Wait()
	closeLab := func(i int) error {
		l := labs[i]
		if labs[i] = nil; l == nil {
			return nil
		}
		return l.Close(context.Background())
	}
	t.Cleanup(func() {
		for i := range labs {
			if err := closeLab(i); err != nil {
				t.Error(err)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	var through [2]string
	for i, l := range labs {
		if err := connect(t.Context(), l.nodes[0], mustListen(t, l.nodes[0])); err != nil {
			t.Errorf("%s: direct: %v", plans[i].Name, err)
		}
		mustListen(t, l.nodes[1])
		through[i] = mustServe(t, l, l.nodes[1], fmt.Sprintf("of-%d", i))
		if err := errors.Join(l.Err(), l.nodes[1].Err()); err != nil {
			t.Errorf("%s: %v", plans[i].Name, err)
		}
	}
	if err := closeLab(0); err != nil {
		t.Fatal(err)
	}
	mustBeGone(t, plans[0].Name)
	l := labs[1]
	if err := connect(t.Context(), l.nodes[1], through[1]); err != nil {
		t.Errorf("a Service of one lab went with the other lab: %v", err)
	}
	mustServe(t, l, l.nodes[1], "later")
	if err := errors.Join(l.Err(), l.nodes[1].Err()); err != nil {
		t.Errorf("%s: %v", plans[1].Name, err)
	}
	if err := closeLab(1); err != nil {
		t.Fatal(err)
	}
	mustBeGone(t, plans[1].Name)
}
