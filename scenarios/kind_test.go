// SPDX-License-Identifier: Apache-2.0

package scenarios_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/kindtest"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/scenarios"
	"github.com/plimsoll-bench/plimsoll/scenarios/load"
)

// A kind cluster without kube-proxy: a Service with a selector is reached from a pod, from its node and from another node, and again
// after the agents and the node were restarted.
func TestKindClusterOnEBPF(t *testing.T) {
	program, err := filepath.Abs("../bin/plimsoll")
	if err != nil {
		t.Fatal(err)
	}
	e, cache := kindtest.Engine(t, program)
	mode, err := dataplane.Find("ebpf")
	if err != nil {
		t.Fatal(err)
	}
	if err := mode.Supported(t.Context()); errors.Is(err, clusters.ErrNotSupported) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("test%d", os.Getpid())
	made, err := kind.Provider{}.Create(t.Context(), clusters.Plan{
		Name: name, Dir: t.TempDir(), Program: program, Cache: cache, NodeImage: kind.OwnImage,
		Sites: []clusters.ProxySpec{mode.Spec(dataplane.Settings{})}, Progress: func(what string) { t.Log(what) },
	})
	if err != nil {
		t.Fatal(err)
	}
	cluster := made[0]
	t.Cleanup(func() {
		if err := cluster.Close(context.Background()); err != nil {
			t.Error(err)
		}
		if out, _ := e.Command(context.Background(), "ps", "--all", "--quiet", "--filter", "name="+name).Output(); len(out) > 0 {
			t.Errorf("containers are left: %s", out)
		}
	})
	site := cluster.Sites()[0]
	if err := site.Err(); err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(cluster.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	pods, err := client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if strings.HasPrefix(p.Name, "kube-proxy") || strings.Contains(p.Spec.Containers[0].Image, "kube-proxy") {
			t.Fatalf("kube-proxy runs: pod %s", p.Name)
		}
	}

	worker, control := "plimsoll-"+name+"-ebpf-worker", "plimsoll-"+name+"-ebpf-control-plane"
	image := "localhost/plimsoll:" + name
	address := mustServeName(t, client, worker, image)
	p, err := site.Client().Start(t.Context(), scenarios.ClientCommand)
	if err != nil {
		t.Fatal(err)
	}
	pod := load.NewDriver(p.Stdin(), p.Stdout())
	// The pod runs before its slice says that it is ready.
	reply, err := pod.Do(t.Context(), load.Request{Kind: load.Wait, Addresses: []netip.AddrPort{address},
		Timeout: 2 * time.Second, Limit: 20 * time.Second, Pause: 40 * time.Millisecond})
	if err != nil || reply.Unsent != 0 {
		t.Errorf("from a pod: %v, %v", reply, err)
	}
	reply, err = pod.Do(t.Context(), load.Request{Kind: load.Identify, Addresses: []netip.AddrPort{address}, Count: 20, Timeout: 2 * time.Second})
	if err != nil || reply.Answered["web"] != 20 {
		t.Errorf("from a pod: %v, %v", reply, err)
	}
	// A restart of the agents is none to who connects.
	agents := metav1.ListOptions{LabelSelector: "app=plimsoll-agent"}
	former := mustListReady(t, client, agents)
	if err := client.CoreV1().Pods(metav1.NamespaceSystem).DeleteCollection(t.Context(), metav1.DeleteOptions{}, agents); err != nil {
		t.Fatal(err)
	}
	for until := time.Now().Add(time.Minute); ; {
		reply, err = pod.Do(t.Context(), load.Request{Kind: load.Identify, Addresses: []netip.AddrPort{address}, Count: 20, Timeout: 2 * time.Second})
		if err != nil || reply.Answered["web"] != 20 {
			t.Fatalf("while the agents restart: %v, %v", reply, err)
		}
		now := mustListReady(t, client, agents)
		if len(now) == len(former) && !slices.ContainsFunc(now, func(name string) bool { return slices.Contains(former, name) }) {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("agents %v were to follow %v", now, former)
		}
	}
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
	for _, node := range []string{worker, control} {
		mustAnswer(t, e, node, address, 20*time.Second)
	}
	// What comes from another node is translated by its packets.
	mustAnswer(t, e, control, mustNodePort(t, client, worker), 20*time.Second)

	// The engine may give the node another address, and everything in it another process.
	if out, err := e.Command(t.Context(), "restart", "--time", "5", worker).CombinedOutput(); err != nil {
		t.Fatalf("restart the node: %v: %s", err, out)
	}
	for _, node := range []string{control, worker} {
		mustAnswer(t, e, node, address, 3*time.Minute)
	}
}

// mustListReady lists pods that are ready.
func mustListReady(t *testing.T, client kubernetes.Interface, which metav1.ListOptions) (names []string) {
	t.Helper()
	pods, err := client.CoreV1().Pods("").List(t.Context(), which)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue }) {
			names = append(names, p.Name)
		}
	}
	return names
}

// mustServeName makes a pod on the node that answers with the name "web", and a Service that selects it, and returns the Service's
// address.
func mustServeName(t *testing.T, client kubernetes.Interface, node, image string) netip.AddrPort {
	t.Helper()
	const port = 8081
	labels := map[string]string{"app": "web"}
	if _, err := client.CoreV1().Pods(metav1.NamespaceDefault).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Labels: labels},
		Spec: corev1.PodSpec{
			NodeName:        node,
			SecurityContext: &corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{{Name: "net.core.somaxconn", Value: "65535"}}},
			Containers: []corev1.Container{{
				Name: "web", Image: image, ImagePullPolicy: corev1.PullNever,
				// The server ends with its input.
				Stdin: true, Args: []string{scenarios.ServerCommand, "--identify", fmt.Sprintf("0.0.0.0:%d", port), "--name", "web"},
			}},
		},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s, err := client.CoreV1().Services(metav1.NamespaceDefault).Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Selector: labels, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(port)}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	address := netip.MustParseAddr(s.Spec.ClusterIP)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w, err := client.CoreV1().Pods(metav1.NamespaceDefault).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=web"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		if p, ok := event.Object.(*corev1.Pod); ok && p.Status.Phase == corev1.PodRunning {
			return netip.AddrPortFrom(address, 80)
		}
	}
	t.Fatal("the pod does not run")
	return netip.AddrPort{}
}

// mustNodePort is where a node has the Service "web".
func mustNodePort(t *testing.T, client kubernetes.Interface, node string) netip.AddrPort {
	t.Helper()
	s, err := client.CoreV1().Services(metav1.NamespaceDefault).Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n, err := client.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return netip.AddrPortFrom(netip.MustParseAddr(a.Address), uint16(s.Spec.Ports[0].NodePort))
		}
	}
	t.Fatalf("node %s has no address", node)
	return netip.AddrPort{}
}

// mustAnswer connects from a process of a node until the Service answers.
func mustAnswer(t *testing.T, e engine.Engine, node string, address netip.AddrPort, limit time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	script := fmt.Sprintf("exec 3<>/dev/tcp/%s/%d && read -r -t 2 name <&3 && echo $name", address.Addr(), address.Port())
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		out, err := e.Command(ctx, "exec", node, "timeout", "3", "bash", "-c", script).CombinedOutput()
		if err == nil && strings.TrimSpace(string(out)) == "web" {
			return
		}
		select {
		case <-ctx.Done():
			t.Errorf("%s does not reach the Service within %v: %v: %s", node, limit, err, out)
			return
		case <-tick.C:
		}
	}
}
