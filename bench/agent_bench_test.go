// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/procfs"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/lab"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"github.com/plimsoll-bench/plimsoll/scenarios/fleet"
)

// BenchmarkAgent shows what an agent takes for many Services of two endpoints each, from a real API server: how long it needs from the
// first lists to the maps, its memory with the maps counted apart, the time from the API write of one more Service to the first connect
// that succeeds, and its CPU while endpoints change a thousand times a second and clients connect. One operation is all of that.
func BenchmarkAgent(b *testing.B) {
	for _, services := range []int{20_000, 50_000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			for b.Loop() {
				benchmarkAgent(b, services)
			}
		})
	}
}

func benchmarkAgent(b *testing.B, services int) {
	bin := needsLab(b)
	needsConnectHook(b)
	node := lbtest.StartNode(b, "10.0.0.1")
	const server = "10.0.0.1:8080"
	node.Listen(b, "tcp", server)
	ns, err := clusters.NetNSOf(node.PID())
	if err != nil {
		b.Fatal(err)
	}
	defer ns.Close()
	control, kubeconfig := mustControlPlane(b, bin, ns)
	config := control.RESTConfig()
	config.QPS, config.Burst = -1, -1
	api, err := kubernetes.NewForConfig(config)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := api.CoreV1().Nodes().Create(b.Context(), &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: agentNode}}, metav1.CreateOptions{}); err != nil {
		b.Fatal(err)
	}
	mustFleet(b, control, api, services)

	log, err := os.CreateTemp(b.TempDir(), "agent")
	if err != nil {
		b.Fatal(err)
	}
	agent := startProgramTo(b, ns, log, "agent", "-v", "2", "--kubeconfig", kubeconfig, "--cgroup", node.Cgroup, "--hostname-override", agentNode,
		"--healthz-bind-address", agentHealth, "--metrics-bind-address", agentMetrics)
	var load time.Duration
	eventually(b, "the agent's first sync", func() (err error) {
		load, err = firstSync(log.Name())
		return err
	})
	b.ReportMetric(load.Seconds()*1000, "cold-load-ms")

	added, after := addServices(b, node, api, 100)
	for name, times := range map[string][]time.Duration{"added": added, "after-write": after} {
		b.ReportMetric(quantile(times, 0.5).Seconds()*1000, name+"-p50-ms")
		b.ReportMetric(quantile(times, 0.99).Seconds()*1000, name+"-p99-ms")
	}

	stop := node.Hammer(b, "tcp", net.JoinHostPort(mustGet(b, api, "added-0"), "80"))
	before := cpuOf(b, agent.Process.Pid)
	changes, elapsed := changeEndpoints(b, api, services, 20*time.Second)
	b.ReportMetric((cpuOf(b, agent.Process.Pid)-before).Seconds()/elapsed.Seconds(), "churn-cores")
	b.ReportMetric(float64(changes)/elapsed.Seconds(), "churn/sec")
	got := stop()
	b.ReportMetric(float64(got.Answers[server]), "connects")
	if len(got.Errors) > 0 {
		b.Errorf("connects failed: %v", got.Errors)
	}

	memory, err := procfs.NewProc(agent.Process.Pid)
	if err != nil {
		b.Fatal(err)
	}
	status, err := memory.NewStatus()
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(status.RssAnon)/(1<<20), "rss-anon-MiB")
	b.ReportMetric(float64(status.RssFile)/(1<<20), "rss-file-MiB")
	b.ReportMetric(float64(status.RssShmem)/(1<<20), "rss-maps-MiB")
	if err := agent.Process.Signal(syscall.SIGTERM); err != nil {
		b.Fatal(err)
	}
	if err := agent.Wait(); err != nil {
		b.Error(err)
	}
}

// mustFleet writes Services of two endpoints into the API server's storage.
func mustFleet(b *testing.B, control *lab.ControlPlane, api kubernetes.Interface, services int) {
	b.Helper()
	etcd, err := control.Etcd()
	if err != nil {
		b.Fatal(err)
	}
	defer etcd.Close()
	f, err := fleet.New(b.Context(), api, etcd, lab.StoragePrefix, fleet.Plan{
		Namespace: "fleet", Endpoints: 2, Port: 80, TargetPort: 8080, Seed: 1, ServiceCIDR: netip.MustParsePrefix("198.19.0.0/16"), // the lab's
		EndpointPrefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/16"), netip.MustParsePrefix("198.17.0.0/16")},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Scale(b.Context(), services, func(int, int) {}); err != nil {
		b.Fatal(err)
	}
}

// firstSync is how long the agent's log says that its first sync of IPv4 took, with what it did to the objects that it had listed.
func firstSync(log string) (time.Duration, error) {
	text, err := os.ReadFile(log)
	if err != nil {
		return 0, err
	}
	found := regexp.MustCompile(`"Synced" ipFamily="IPv4" changes=(\d+) elapsed="([^"]+)"`).FindSubmatch(text)
	if found == nil {
		return 0, errors.New("no sync in the agent's log")
	}
	return time.ParseDuration(string(found[2]))
}

// addServices adds Services, one after the other, and times each to the first connect that succeeds: from before the API write, which takes
// the API server the longer the more Services there are, and from its end. Its endpoints are there before.
func addServices(b *testing.B, node *lbtest.Node, api kubernetes.Interface, n int) (added, after []time.Duration) {
	b.Helper()
	for i := range n {
		name := fmt.Sprintf("added-%d", i)
		slice := newEndpointSlice(name, "10.0.0.1")
		if _, err := api.DiscoveryV1().EndpointSlices("default").Create(b.Context(), slice, metav1.CreateOptions{}); err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		service, err := api.CoreV1().Services("default").Create(b.Context(), &v1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1.ServiceSpec{Ports: []v1.ServicePort{{Port: 80}}},
		}, metav1.CreateOptions{})
		if err != nil {
			b.Fatal(err)
		}
		written := time.Now()
		address := net.JoinHostPort(service.Spec.ClusterIP, "80")
		for len(node.Connect(b, "tcp", address, 1).Answers) == 0 {
			if time.Since(start) > 10*time.Second {
				b.Fatalf("%s does not answer", address)
			}
		}
		added, after = append(added, time.Since(start)), append(after, time.Since(written))
	}
	return added, after
}

// newEndpointSlice is a slice of a Service with one ready endpoint at port 8080.
func newEndpointSlice(service, address string) *discovery.EndpointSlice {
	name, port, ready := "", int32(8080), true
	return &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service, Labels: map[string]string{discovery.LabelServiceName: service}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &name, Port: &port}},
		Endpoints:   []discovery.Endpoint{{Addresses: []string{address}, Conditions: discovery.EndpointConditions{Ready: &ready}}},
	}
}

func mustGet(b *testing.B, api kubernetes.Interface, name string) string {
	b.Helper()
	s, err := api.CoreV1().Services("default").Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return s.Spec.ClusterIP
}

// changeEndpoints changes one endpoint of one Service a thousand times a second, at most, as fast as the API server takes it, and returns
// how many changes it took in what time.
func changeEndpoints(b *testing.B, api kubernetes.Interface, services int, limit time.Duration) (int, time.Duration) {
	b.Helper()
	list, err := api.DiscoveryV1().EndpointSlices("fleet").List(b.Context(), metav1.ListOptions{Limit: 2000})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(b.Context(), limit)
	defer cancel()
	due := make(chan int)
	go func() {
		defer close(due)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			select {
			case due <- i:
			case <-ctx.Done():
				return
			}
		}
	}()
	var done atomic.Int64
	var writers sync.WaitGroup
	start := time.Now()
	for range 16 {
		writers.Go(func() {
			for i := range due {
				slice := list.Items[i%len(list.Items)].DeepCopy()
				slice.ResourceVersion = "" // whatever it is now
				// Addresses come and go.
				slice.Endpoints = slice.Endpoints[:1+i/len(list.Items)%2]
				if _, err := api.DiscoveryV1().EndpointSlices("fleet").Update(ctx, slice, metav1.UpdateOptions{}); ctx.Err() != nil {
					return
				} else if err != nil {
					b.Error(err)
					return
				}
				done.Add(1)
			}
		})
	}
	writers.Wait()
	return int(done.Load()), time.Since(start)
}

// cpuOf is the CPU time that a process has used.
func cpuOf(b *testing.B, pid int) time.Duration {
	b.Helper()
	p, err := procfs.NewProc(pid)
	if err != nil {
		b.Fatal(err)
	}
	stat, err := p.Stat()
	if err != nil {
		b.Fatal(err)
	}
	return time.Duration(stat.CPUTime() * float64(time.Second))
}

func quantile(times []time.Duration, q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}
