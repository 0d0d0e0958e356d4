// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// killsVariable is how often the agent is killed; the default is what a test that runs with all others can afford.
const killsVariable = "PLIMSOLL_KILLS"

// An agent is killed at random moments, and the next one takes over what it pinned, while endpoints come and go and clients connect
// without a pause, by sockets and by packets. No connect fails. What is left in the end --cleanup removes, and nothing else.
func TestAgentIsKilledAndNoConnectFails(t *testing.T) {
	bin := needsLab(t)
	kills := 15
	if text := os.Getenv(killsVariable); text != "" {
		var err error
		if kills, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	// The path is for other processes, too.
	pins := strings.Replace(lbtest.MountBPF(t), "self", strconv.Itoa(os.Getpid()), 1)
	snapshot := filepath.Join(t.TempDir(), "snapshot")
	node := lbtest.StartNode(t, "10.0.0.1")
	needsConnectHook(t)
	client := node.AddPod(t, "client", "10.1.0.1")
	backends := []string{"10.1.0.2", "10.1.0.3"}
	for i, address := range backends {
		node.AddPod(t, fmt.Sprintf("backend%d", i), address).Listen(t, "tcp", net.JoinHostPort(address, "8080"))
	}
	ns, err := clusters.NetNSOf(node.PID())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	// What kube-proxy left is not the agent's to remove.
	if err := ns.Do(exec.Command("nft", "add", "table", "ip", "kube-proxy").Run); err != nil {
		t.Fatal(err)
	}
	api, kubeconfig := mustAPI(t, bin, ns)
	if _, err := api.CoreV1().Nodes().Create(t.Context(), &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: agentNode}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	address, slice := mustServiceOf(t, api, backends)

	args := []string{"agent", "--kubeconfig", kubeconfig, "--cgroup", node.Cgroup, "--devices", "*", "--hostname-override", agentNode,
		"--pin-dir", pins, "--snapshot", snapshot, "--healthz-bind-address", agentHealth, "--metrics-bind-address", agentMetrics}
	agent := startProgram(t, ns, args...)
	for _, pod := range []*lbtest.Pod{node.Pod, client} {
		eventually(t, "the Service to answer", func() error {
			if got := pod.Connect(t, "tcp", address, 1); len(got.Answers) == 0 {
				return fmt.Errorf("got %+v", got)
			}
			return nil
		})
	}

	ctx, stopChurn := context.WithCancel(t.Context())
	churned := make(chan error, 1)
	go func() { churned <- churn(ctx, api, slice, backends) }()
	stopNode, stopClient := node.Hammer(t, "tcp", address), client.Hammer(t, "tcp", address)
	const seed = 1
	random := rand.New(rand.NewPCG(seed, seed))
	for range kills {
		// From before its programs are loaded until long after it has synced.
		<-time.After(time.Duration(random.IntN(1500)) * time.Millisecond)
		if err := agent.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := agent.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Fatalf("the agent was to be killed, and ended with %v", err)
		}
		agent = startProgram(t, ns, args...)
	}
	stopChurn()
	if err := <-churned; err != nil {
		t.Error(err)
	}
	for how, stop := range map[string]func() lbtest.Outcome{"by sockets": stopNode, "by packets": stopClient} {
		got := stop()
		t.Logf("%s: %v", how, got.Answers)
		if len(got.Errors) > 0 || len(got.Answers) != len(backends) {
			t.Errorf("%s, over %d kills: want no errors and answers of all endpoints, got %+v", how, kills, got)
		}
	}

	plimsoll := func(args ...string) (string, error) {
		var said []byte
		err := ns.Do(func() (err error) {
			said, err = exec.Command(agent.Path, args...).CombinedOutput()
			return err
		})
		return string(said), err
	}
	cleanup := func() (string, error) {
		return plimsoll("agent", "--cleanup", "--pin-dir", pins, "--snapshot", snapshot)
	}
	status := func() error {
		said, err := plimsoll("status", "--address", agentMetrics)
		for _, want := range []string{"True", "connect4", "tcx ingress at backend0 backend1 client", "2 ClusterIP", "answers; last heard", "kube-proxy's rules are still there: nftables: table ip kube-proxy"} {
			if err == nil && !strings.Contains(said, want) {
				err = fmt.Errorf("it does not say %q", want)
			}
		}
		if err != nil {
			return fmt.Errorf("status: %w: %s", err, said)
		}
		return nil
	}
	eventually(t, "the status of an agent that does all", status)
	if said, err := cleanup(); err == nil || !strings.Contains(said, "another agent is on this node") {
		t.Errorf("cleaned up beside an agent at work: %v, %s", err, said)
	}
	if err := agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	agent.Wait()
	if said, err := plimsoll("status", "--address", agentMetrics); err == nil || !strings.Contains(said, "KubeProxyReplacement: False: no agent answers at "+agentMetrics) {
		t.Errorf("the status of no agent: %v, %s", err, said)
	}
	for range 2 { // the second time there is nothing left to clean up
		if said, err := cleanup(); err != nil || said != "" {
			t.Errorf("clean up: %v, %s", err, said)
		}
	}
	for _, pod := range []*lbtest.Pod{node.Pod, client} {
		if got := pod.Connect(t, "tcp", address, 1); got.Errors["network is unreachable"] != 1 {
			t.Errorf("after the clean-up: %+v", got)
		}
	}
	// The kernel's own two files in each bpffs are no folders.
	left, err := filepath.Glob(filepath.Join(pins, "*", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("pins are left: %v, %v", left, err)
	}
	if _, err := os.Stat(snapshot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the snapshot is left: %v", err)
	}
	err = ns.Do(func() error {
		tables, err := exec.Command("nft", "list", "tables").Output()
		if string(tables) != "table ip kube-proxy\n" {
			t.Errorf("want another's table alone, got %q", tables)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// mustServiceOf creates a Service with these endpoints at port 8080, and returns where it is and its slice.
func mustServiceOf(t *testing.T, api kubernetes.Interface, addresses []string) (string, *discovery.EndpointSlice) {
	t.Helper()
	service, err := api.CoreV1().Services("default").Create(t.Context(), &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "churn"}, Spec: v1.ServiceSpec{Ports: []v1.ServicePort{{Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	name, port := "", int32(8080)
	slice, err := api.DiscoveryV1().EndpointSlices("default").Create(t.Context(), &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: "churn-1", Labels: map[string]string{discovery.LabelServiceName: "churn"}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &name, Port: &port}},
		Endpoints:   endpointsAt(addresses),
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort(service.Spec.ClusterIP, "80"), slice
}

func endpointsAt(addresses []string) []discovery.Endpoint {
	var endpoints []discovery.Endpoint
	ready := true
	for _, a := range addresses {
		endpoints = append(endpoints, discovery.Endpoint{Addresses: []string{a}, Conditions: discovery.EndpointConditions{Ready: &ready}})
	}
	return endpoints
}

// churn changes the endpoints of a slice until ctx ends: the one, the other, both.
func churn(ctx context.Context, api kubernetes.Interface, slice *discovery.EndpointSlice, addresses []string) error {
	sets := [][]string{addresses[:1], addresses[1:], addresses, {addresses[1], addresses[0]}}
	for i := 0; ; i++ {
		slice.Endpoints = endpointsAt(slices.Clone(sets[i%len(sets)]))
		updated, err := api.DiscoveryV1().EndpointSlices("default").Update(ctx, slice, metav1.UpdateOptions{})
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		slice = updated
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(20 * time.Millisecond):
		}
	}
}
