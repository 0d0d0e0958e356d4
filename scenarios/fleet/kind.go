// SPDX-License-Identifier: Apache-2.0

package fleet

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

// A kind is one of the three objects that make a Service.
type kind int

const (
	kindIPAddress kind = iota
	kindSlice
	kindService
	kinds
)

func (k kind) String() string {
	return [kinds]string{"IPAddresses", "EndpointSlices", "Services"}[k]
}

// list reads all objects of a kind: those of the namespace, or for IPAddresses, which have none, all there are.
func (k kind) list(ctx context.Context, client kubernetes.Interface, namespace string, opts metav1.ListOptions) (runtime.Object, error) {
	switch k {
	case kindIPAddress:
		return client.NetworkingV1().IPAddresses().List(ctx, opts)
	case kindSlice:
		return client.DiscoveryV1().EndpointSlices(namespace).List(ctx, opts)
	default:
		return client.CoreV1().Services(namespace).List(ctx, opts)
	}
}

func (k kind) watch(ctx context.Context, client kubernetes.Interface, namespace string, opts metav1.ListOptions) (watch.Interface, error) {
	switch k {
	case kindIPAddress:
		return client.NetworkingV1().IPAddresses().Watch(ctx, opts)
	case kindSlice:
		return client.DiscoveryV1().EndpointSlices(namespace).Watch(ctx, opts)
	default:
		return client.CoreV1().Services(namespace).Watch(ctx, opts)
	}
}

// example is an empty object of the kind.
func (k kind) example() runtime.Object {
	return [kinds]runtime.Object{&networkingv1.IPAddress{}, &discoveryv1.EndpointSlice{}, &corev1.Service{}}[k]
}

// An entry is what the fleet remembers of an object: its name, and what ties it to its Service. That is the address of a
// Service, the Service's name of a slice, and namespace/name of the Service of an IPAddress.
type entry struct{ name, tie string }

// entries are those of the services, in their order.
func (k kind) entries(services []Service, namespace string) []entry {
	all := make([]entry, len(services))
	for i, s := range services {
		addr := s.Address.Addr().String()
		switch k {
		case kindIPAddress:
			all[i] = entry{addr, namespace + "/" + s.Name}
		case kindSlice:
			all[i] = entry{s.Name, s.Name}
		default:
			all[i] = entry{s.Name, addr}
		}
	}
	return all
}

// entryOf reads an object's entry. ours says whether it is in the namespace; an IPAddress is where its Service is.
func entryOf(obj any, namespace string) (e entry, ours bool) {
	switch o := obj.(type) {
	case *networkingv1.IPAddress:
		if ref := o.Spec.ParentRef; ref != nil && ref.Group == "" && ref.Resource == "services" {
			e.tie = ref.Namespace + "/" + ref.Name
		}
		e.name = o.Name
		return e, strings.HasPrefix(e.tie, namespace+"/")
	case *discoveryv1.EndpointSlice:
		return entry{o.Name, o.Labels[discoveryv1.LabelServiceName]}, o.Namespace == namespace
	case *corev1.Service:
		return entry{o.Name, o.Spec.ClusterIP}, o.Namespace == namespace
	}
	return e, false
}

// A change is how to get from what there is to what is wanted of one kind.
type change struct {
	want    []entry
	missing []int   // indexes into want, rising
	surplus []entry // what there is instead
	theirs  bool    // the API server does it, we only wait
}

// take lists the missing ones of services from start to before end.
func (c change) take(services []Service, start, end int) []Service {
	from, _ := slices.BinarySearch(c.missing, start)
	to, _ := slices.BinarySearch(c.missing, end)
	taken := make([]Service, 0, to-from)
	for _, i := range c.missing[from:to] {
		taken = append(taken, services[i])
	}
	return taken
}

// done says whether have is exactly what is wanted.
func (c change) done(have map[string]string) bool {
	if len(have) != len(c.want) {
		return false
	}
	for _, e := range c.want {
		if tie, ok := have[e.name]; !ok || tie != e.tie {
			return false
		}
	}
	return true
}

// listed says whether one consistent LIST of the kind shows exactly what is wanted.
func (k kind) listed(ctx context.Context, client kubernetes.Interface, namespace string, c change) (bool, error) {
	list, err := k.list(ctx, client, namespace, metav1.ListOptions{})
	if err != nil {
		return false, fmt.Errorf("list %s: %w", k, err)
	}
	have := make(map[string]string, len(c.want))
	err = meta.EachListItem(list, func(obj runtime.Object) error {
		if e, ours := entryOf(obj, namespace); ours {
			have[e.name] = e.tie
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("list %s: %w", k, err)
	}
	return c.done(have), nil
}
