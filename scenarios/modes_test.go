// SPDX-License-Identifier: Apache-2.0

package scenarios_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/lab"
	"github.com/plimsoll-bench/plimsoll/clusters/lab/labtest"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/scenarios"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

const (
	namePort = 9000 // where backend pods say their name
	within   = 20 * time.Second
)

// node is a site of the test's lab with a client in it.
type node struct {
	clusters.Site
	client *load.Driver
}

// mustOpen opens a lab with one node for each mode that this host carries and that has a proxy, and starts servers that say
// their names.
func mustOpen(t *testing.T) (kubernetes.Interface, []node) {
	t.Helper()
	if testing.Short() {
		t.Skip("stands up a lab: not in -short")
	}
	bin := labtest.Bin(t, "../bin")
	plan := clusters.Plan{Name: fmt.Sprintf("test-modes-%d", os.Getpid()), Dir: t.TempDir(), Bin: bin, Program: mustBuild(t)}
	for _, m := range dataplane.Modes {
		if m.Floor() == "" {
			continue
		}
		if err := m.Supported(t.Context()); errors.Is(err, clusters.ErrNotSupported) {
			t.Logf("%s is left out: %v", m.Name(), err)
			continue
		} else if err != nil {
			t.Fatalf("%s: %v", m.Name(), err)
		}
		plan.Sites = append(plan.Sites, m.Spec(dataplane.Settings{}))
	}
	made, err := lab.Provider{}.Create(t.Context(), plan)
	if err != nil {
		t.Fatal(err)
	}
	cluster := made[0]
	t.Cleanup(func() {
		if err := cluster.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	var nodes []node
	for _, s := range cluster.Sites() {
		if err := s.Err(); err != nil {
			t.Fatal(err)
		}
		for _, pod := range s.Backends() {
			p, err := pod.Start(t.Context(), scenarios.ServerCommand, "--identify", fmt.Sprintf("0.0.0.0:%d", namePort), "--name", pod.Name())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := load.NewServer(p.Stdin(), p.Stdout()).Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		p, err := s.Client().Start(t.Context(), scenarios.ClientCommand)
		if err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, node{s, load.NewDriver(p.Stdin(), p.Stdout())})
	}
	client, err := kubernetes.NewForConfig(cluster.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	return client, nodes
}

// mustBuild builds plimsoll, so that a test is of this source and not of whatever lies in bin/.
func mustBuild(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "plimsoll")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../bench").CombinedOutput(); err != nil {
		t.Fatalf("build plimsoll: %v\n%s", err, out)
	}
	return program
}

// await asks the Service n times on every node until what the clients see is as wanted.
func await(t *testing.T, nodes []node, address netip.AddrPort, n int, what string, ok func(load.Reply) bool) {
	t.Helper()
	for _, node := range nodes {
		deadline := time.Now().Add(within)
		for {
			reply, err := node.client.Do(t.Context(), load.Request{Kind: load.Identify, Addresses: []netip.AddrPort{address}, Count: n, Timeout: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			if ok(reply) {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s: %s: after %s clients see answers %v, errors %v", node.Spec().Name, what, within, reply.Answered, reply.Errors)
				break
			}
		}
	}
}

// The same Service goes through its life in every mode at once, and clients see the same of it.
func TestServicesBehaveTheSameInEveryMode(t *testing.T) {
	client, nodes := mustOpen(t)
	ctx := t.Context()
	service, err := client.CoreV1().Services("default").Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "life"},
		Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	address := netip.AddrPortFrom(netip.MustParseAddr(service.Spec.ClusterIP), 80)
	// One at a time: the kernel limits the rate of the ICMP errors that kube-proxy refuses by (net.ipv4.icmp_ratelimit).
	refused := func(r load.Reply) bool { return r.Errors["ECONNREFUSED"] == 1 }
	await(t, nodes, address, 1, "a Service without endpoints refuses", refused)

	port, protocol, ready := int32(namePort), corev1.ProtocolTCP, true
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "life-1", Labels: map[string]string{discoveryv1.LabelServiceName: "life"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Port: &port, Protocol: &protocol}},
	}
	var pods []string
	for _, b := range nodes[0].Backends() {
		pods = append(pods, b.Name())
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{b.Address().String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
	}
	slices.Sort(pods)
	if slice, err = client.DiscoveryV1().EndpointSlices("default").Create(ctx, slice, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// Of 200 connects, fewer than 60 to one of two backends is a chance of less than one in 10^8.
	await(t, nodes, address, 200, "both endpoints answer, evenly", func(r load.Reply) bool {
		for _, n := range r.Answered {
			if n < 60 {
				return false
			}
		}
		return r.Failed() == 0 && slices.Equal(slices.Sorted(maps.Keys(r.Answered)), pods)
	})

	unready := false
	slice.Endpoints[0].Conditions.Ready = &unready
	if slice, err = client.DiscoveryV1().EndpointSlices("default").Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, nodes, address, 50, "only the ready endpoint answers", func(r load.Reply) bool {
		return r.Answered[nodes[0].Backends()[1].Name()] == 50
	})

	if err := client.DiscoveryV1().EndpointSlices("default").Delete(ctx, slice.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, nodes, address, 1, "a Service that lost its endpoints refuses", refused)
}
