// SPDX-License-Identifier: Apache-2.0

package kind

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"text/template"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
)

// site is the worker of a cluster, with a client pod, backend pods and the proxy's pod.
type site struct {
	cluster *cluster
	spec    clusters.ProxySpec
	dir     string
	*node
	client   *pod
	backends []*pod
	iptables string
	// pod is the proxy's, and proxy the cgroup of its processes; nil without a proxy.
	pod   *corev1.Pod
	proxy *host.Cgroup

	mu      sync.Mutex // guards what follows
	stopped bool       // the proxy's end is wanted
	err     error      // why the proxy does not serve
}

var _ clusters.Site = (*site)(nil)

const (
	// systemNamespace holds the proxy, whose pods have proxyLabel; a site's pods have a namespace of the site's name.
	systemNamespace = metav1.NamespaceSystem
	proxyLabel      = "k8s-app=kube-proxy"
	clientPod       = "client"
	// podLimit is how long pods may take to run on a busy host; on a quiet one they take seconds.
	podLimit = 3 * time.Minute
)

var backendPods = []string{"backend-0", "backend-1"}

// populate starts the site's proxy and pods, and returns when all run or the proxy has failed and Err says why.
func (s *site) populate(ctx context.Context) error {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	if s.spec.ConntrackHooks {
		if err := clusters.InstallConntrackHooks(ctx, s.ns); err != nil {
			return err
		}
	}
	if s.spec.Agent {
		if err := s.cluster.mountBPF(ctx); err != nil {
			return err
		}
	}
	if err := s.apply(ctx); err != nil {
		return err
	}
	var err error
	if s.client, err = s.enterPod(ctx, clientPod); err != nil {
		return err
	}
	for _, name := range backendPods {
		b, err := s.enterPod(ctx, name)
		if err != nil {
			return err
		}
		s.backends = append(s.backends, b)
	}
	if err := s.writeIPTables(); err != nil {
		return err
	}
	if s.spec.KubeProxy == "" && !s.spec.Agent {
		return nil // and no CoreDNS, because nothing carries Services here
	}
	if err := s.enterProxy(ctx); err != nil {
		if ctx.Err() != nil {
			return err
		}
		s.err = err
		return nil
	}
	if s.spec.Agent {
		if err := s.installDNS(ctx); err != nil {
			return err
		}
	}
	return s.awaitDNS(ctx)
}

//go:embed pods.yaml
var podsManifest string

//go:embed agent.yaml
var agentManifest string

// manifestValues are what the manifests' templates want to know.
type manifestValues struct {
	// Namespace is that of the pods of Pods, which run on Node.
	Namespace, Image, Node string
	// APIServer is the control plane's name; Cgroup where a node sees its cgroup2; Wait what pods run until something is started in
	// them; MinSyncPeriod empty for the agent's own default.
	APIServer, Cgroup, Wait, MinSyncPeriod string
	// PodCIDR is where pods are; Packets has the agent leave sockets alone; PeerNames is the agent's flag.
	PodCIDR            string
	Packets, PeerNames bool

	Pods []struct{ Name, App string }
}

// manifests are the objects that a site wants of its cluster, as YAML.
func (s *site) manifests() ([]byte, error) {
	values := manifestValues{
		Namespace: s.spec.Name, Image: s.cluster.world.pods, Node: s.name, APIServer: s.cluster.controlName(), Wait: WaitCommand,
		PodCIDR: s.cluster.world.ranges(podsOf), Packets: s.spec.Packets, PeerNames: s.spec.PeerNames,
		Pods: []struct{ Name, App string }{{clientPod, "client"}},
	}
	for _, name := range backendPods {
		values.Pods = append(values.Pods, struct{ Name, App string }{name, "backend"})
	}
	var err error
	if values.Cgroup, err = clusters.Cgroup2MountOf(s.pid); err != nil {
		return nil, err
	}
	if p := s.spec.MinSyncPeriod; p != nil {
		values.MinSyncPeriod = p.String()
	}
	text := podsManifest
	if s.spec.Agent {
		text += "---\n" + agentManifest
	}
	t, err := template.New("").Parse(text)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = t.Execute(&b, values)
	return b.Bytes(), err
}

// apply creates the site's objects, by the control plane's own kubectl.
func (s *site) apply(ctx context.Context) error {
	text, err := s.manifests()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.dir, "manifests.yaml"), text, 0o644); err != nil {
		return err
	}
	var said bytes.Buffer
	cmd := s.cluster.control.kind.CommandContext(ctx, "kubectl", "--kubeconfig=/etc/kubernetes/admin.conf", "apply", "-f", "-")
	if err := cmd.SetStdin(bytes.NewReader(text)).SetStderr(&said).Run(); err != nil {
		return fmt.Errorf("create the pods: %w: %s", err, lastLine(said.Bytes()))
	}
	return nil
}

// enterPod waits until a pod runs and takes hold of its namespaces and its cgroup.
func (s *site) enterPod(ctx context.Context, name string) (*pod, error) {
	object, err := s.awaitPod(ctx, s.spec.Name, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return nil, err
	}
	p := &pod{site: s, name: name}
	return p, p.enter(object)
}

// proxyPod selects the worker's kube-proxy or agent in systemNamespace.
func (s *site) proxyPod() metav1.ListOptions {
	return metav1.ListOptions{LabelSelector: proxyLabel, FieldSelector: "spec.nodeName=" + s.name}
}

// enterProxy waits until the worker's kube-proxy or agent is ready.
func (s *site) enterProxy(ctx context.Context) error {
	object, err := s.awaitPod(ctx, systemNamespace, s.proxyPod())
	if err != nil {
		return err
	}
	s.pod = object
	_, s.proxy, err = container(object)
	return err
}

// awaitPod returns the one pod that the options select once it is ready. An error says what its container said last.
func (s *site) awaitPod(ctx context.Context, namespace string, options metav1.ListOptions) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, podLimit, fmt.Errorf("not within %v", podLimit))
	defer cancel()
	what := strings.Trim(options.LabelSelector+","+options.FieldSelector, ",")
	var last *corev1.Pod
	err := host.Poll(ctx, "pod "+what+" to be ready", func() (bool, error) {
		list, err := s.cluster.client.CoreV1().Pods(namespace).List(ctx, options)
		if err != nil || len(list.Items) == 0 {
			return false, err
		}
		last = &list.Items[0]
		for _, c := range last.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return true, nil
			}
		}
		// One that has been started again and again is not going to be.
		if states := last.Status.ContainerStatuses; len(states) > 0 && states[0].RestartCount >= 3 {
			cancel()
		}
		return false, nil
	})
	if err != nil {
		return nil, fmt.Errorf("%w%s", err, s.lastWords(context.WithoutCancel(ctx), last))
	}
	return last, nil
}

// keepLog writes the proxy's log into the site's folder, where it can be had: a cluster is removed without it too.
func (s *site) keepLog(ctx context.Context) {
	if s.pod == nil {
		return
	}
	host.Poll(ctx, "the proxy's log", func() (bool, error) {
		pods := s.cluster.client.CoreV1().Pods(systemNamespace)
		// A test may have had another one started in its place.
		list, err := pods.List(ctx, s.proxyPod())
		if err != nil || len(list.Items) == 0 {
			return err == nil, err
		}
		b, err := pods.GetLogs(list.Items[0].Name, &corev1.PodLogOptions{}).DoRaw(ctx)
		if err != nil {
			return false, err
		}
		return true, os.WriteFile(filepath.Join(s.dir, "proxy.log"), b, 0o644)
	})
}

// lastWords quotes the end of a pod's log, or what keeps it from running.
func (s *site) lastWords(ctx context.Context, p *corev1.Pod) string {
	if p == nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	lines := int64(1)
	for _, previous := range []bool{true, false} {
		out, err := s.cluster.client.CoreV1().Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{TailLines: &lines, Previous: previous}).DoRaw(ctx)
		if err == nil && len(out) > 0 {
			return fmt.Sprintf("; %s says: %s", p.Name, strings.TrimSpace(string(out)))
		}
	}
	for _, c := range p.Status.ContainerStatuses {
		if w := c.State.Waiting; w != nil {
			return fmt.Sprintf("; %s waits: %s %s", p.Name, w.Reason, w.Message)
		}
	}
	for _, c := range p.Status.Conditions {
		if c.Status == corev1.ConditionFalse && c.Message != "" {
			return fmt.Sprintf("; %s: %s", p.Name, c.Message)
		}
	}
	return ""
}

// writeIPTables makes a command that runs the node's own iptables in the node.
func (s *site) writeIPTables() error {
	if s.spec.IPTables == "" {
		return nil
	}
	s.iptables = filepath.Join(s.dir, "iptables")
	script := fmt.Sprintf("#!/bin/sh\nexec nsenter --target %d --net --mount -- xtables-%s-multi iptables \"$@\"\n", s.pid, s.spec.IPTables)
	return os.WriteFile(s.iptables, []byte(script), 0o755)
}

// installDNS has kubeadm install CoreDNS, which it left out when it made the cluster (laterDNS).
func (s *site) installDNS(ctx context.Context) error {
	var said bytes.Buffer
	cmd := s.cluster.control.kind.CommandContext(ctx, "kubeadm", "init", "phase", "addon", "coredns", "--config=/kind/kubeadm.conf")
	if err := cmd.SetStderr(&said).Run(); err != nil {
		return fmt.Errorf("install CoreDNS: %w: %s", err, lastLine(said.Bytes()))
	}
	return nil
}

// awaitDNS returns when CoreDNS is ready: the proxy carries Services, and those that every cluster has have their endpoints.
func (s *site) awaitDNS(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, podLimit, fmt.Errorf("not within %v", podLimit))
	defer cancel()
	return host.Poll(ctx, "CoreDNS to be ready", func() (bool, error) {
		d, err := s.cluster.client.AppsV1().Deployments(systemNamespace).Get(ctx, "coredns", metav1.GetOptions{})
		if err != nil {
			return false, err
		}
		return d.Spec.Replicas != nil && d.Status.ReadyReplicas == *d.Spec.Replicas, nil
	})
}

func (s *site) Spec() clusters.ProxySpec   { return s.spec }
func (s *site) Enter(f func() error) error { return s.ns.Do(f) }
func (s *site) IPTables() string           { return s.iptables }
func (s *site) Client() clusters.Pod       { return s.client }

func (s *site) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return s.ns.DialContext(ctx, network, address)
}

func (s *site) Backends() []clusters.Pod {
	pods := make([]clusters.Pod, len(s.backends))
	for i, b := range s.backends {
		pods[i] = b
	}
	return pods
}

// EndpointPrefixes are the backend pods' own addresses: a real pod has one.
func (s *site) EndpointPrefixes() []netip.Prefix {
	var all []netip.Prefix
	for _, b := range s.backends {
		all = append(all, netip.PrefixFrom(b.address, b.address.BitLen()))
	}
	return all
}

func (s *site) ProxyCgroup() string {
	if s.proxy == nil {
		return ""
	}
	return s.proxy.Dir
}

// Freeze stops the worker, with all its pods.
func (s *site) Freeze(ctx context.Context, frozen bool) error { return s.cgroup.Freeze(ctx, frozen) }

// Stop deletes the proxy's daemon set, so that nobody starts it again, and kills its processes.
func (s *site) Stop(ctx context.Context) error {
	s.mu.Lock()
	if s.proxy == nil || s.stopped {
		s.mu.Unlock()
		return nil
	}
	s.stopped = true
	s.mu.Unlock()
	if err := errors.Join(s.cluster.Pause(ctx, false), s.Freeze(ctx, false)); err != nil {
		return err
	}
	name := "kube-proxy"
	if s.spec.Agent {
		name = "plimsoll-agent"
	}
	if err := s.cluster.client.AppsV1().DaemonSets(systemNamespace).Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("%s: delete the daemon set %s: %w", s.spec.Name, name, err)
	}
	if err := s.proxy.Kill(ctx); err != nil {
		return fmt.Errorf("%s: end %s: %w", s.spec.Name, name, err)
	}
	return nil
}

func (s *site) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.stopped || s.proxy == nil {
		return s.err
	}
	populated, err := s.proxy.Populated()
	if errors.Is(err, fs.ErrNotExist) || err == nil && !populated {
		err = fmt.Errorf("%s: the proxy's container has ended", s.spec.Name)
	}
	s.err = err
	return err
}
